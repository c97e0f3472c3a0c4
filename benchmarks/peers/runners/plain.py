"""What every runner shares: the job it is given, and the plain model that it gives back.

A runner is executed by the interpreter of its peer's own environment, with the job's file as its argument, and imports
from here nothing of this project: torch, Transformers and safetensors, which all peers bring.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Job:
    """model: directory of the original; calibration: see `windows`; output: directory to write the plain model to.

    device: of torch; quick: only to see that it works, with as few steps as the peer allows; options: the runner's own.
    """

    model: str
    calibration: str
    output: str
    bits: int
    group_size: int
    device: str
    quick: bool
    options: dict[str, Any]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Job:
        return cls(**json.loads(path.read_text()))

    @property
    def windows(self) -> Tensor:
        """Calibration tokens, int64 [windows, length]."""
        return load_file(self.calibration)["tokens"]

    @property
    def held_out(self) -> Tensor:
        """Windows for recipes that choose their best step on other text, int64 [windows, length]."""
        return load_file(self.calibration)["held_out"]

    @property
    def dtype(self) -> torch.dtype | str:
        """What the options say; else the checkpoint's own on a GPU, as all peers' examples load it, and float32 on a CPU,
        which half precision slows.
        """
        if "dtype" in self.options:
            return getattr(torch, self.options["dtype"])
        return torch.float32 if self.device == "cpu" else "auto"

    def load(self, dtype: torch.dtype | str | None = None) -> nn.Module:
        found = transformers.AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype or self.dtype)
        return found.eval()

    def tokenizer(self) -> Any:
        return transformers.AutoTokenizer.from_pretrained(self.model)


@dataclass(frozen=True)
class Outcome:
    """weights: linear's path → what it multiplies with, [N, C]; others: the other parameters, if any were changed.

    seconds: quantization alone, without loading and saving; bits_per_weight: with scales and zero points; activations: what the
    linears round their inputs to; logits: of the first calibration window by the quantizer's own model, [T, V], if it can run:
    what was read is held against them.
    """

    weights: Mapping[str, Tensor]
    seconds: float
    bits_per_weight: float
    group_size: int
    others: Mapping[str, Tensor]
    activations: str = "not rounded"
    logits: Tensor | None = None


class Stopwatch:
    """`with Stopwatch(device) as watch: …`, then `watch.seconds`."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def __enter__(self) -> Stopwatch:
        self.start = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = self._now() - self.start


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """All but the output embedding, by path: what every peer is asked to quantize."""
    head = model.get_output_embeddings()
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


@torch.no_grad()
def effective_weight(linear: nn.Module, features: int, device: str, dtype: torch.dtype) -> Tensor:
    """float32 [N, C] on the CPU: what the layer multiplies with, read off its answers to the unit vectors."""
    unit = torch.eye(features, device=device, dtype=dtype)
    bias = linear(torch.zeros_like(unit[:1]))
    return (linear(unit).float() - bias.float()).T.contiguous().cpu()


def affine_bits(bits: int, group_size: int, zero_point: bool, scale_bits: int = 16) -> float:
    """Stored bits per weight: a scale a group, and a zero point as wide as a weight unless the grid is symmetric."""
    return bits + (scale_bits + (bits if zero_point else 0)) / group_size


def rotation_bits(weights: Iterable[Tensor], rotations: int) -> float:
    """Bits per weight of ParoQuant's transforms as stored: 16 bits a channel and rotation for pairs, 8 for angles; channel scales."""
    shapes = [weight.shape for weight in weights]
    stored = sum(columns * (rotations * (16 + 8) + 16) for _, columns in shapes)
    return stored / sum(rows * columns for rows, columns in shapes)


#: By how much logits of the plain model may differ from the quantizer's own, relative to their spread. bfloat16 is off
#: by 0.015, weights of another rounding by 0.1 and more.
SAME = 0.05


def _save(job: Job, outcome: Outcome) -> float | None:
    """Write the original with the outcome's weights, float32. Return how far its logits are from the quantizer's own.

    Raises `ValueError` if a linear was left out or added, and if the two models do not compute the same.
    """
    model = job.load(torch.float32)
    wanted = set(linears_of(model))
    if wanted != set(outcome.weights):
        odd = sorted(wanted ^ set(outcome.weights))
        raise ValueError(f"{len(odd)} linears were left out or unexpected, the first {odd[0]!r}")
    changed = {**outcome.others, **{f"{path}.weight": weight for path, weight in outcome.weights.items()}}
    if bad := [name for name, value in changed.items() if not torch.isfinite(value).all()]:
        raise ValueError(f"{bad[0]} has values that are not finite")
    model.load_state_dict({name: value.float().cpu() for name, value in changed.items()}, strict=False)
    difference = None if outcome.logits is None else _difference(model, job.windows[:1], outcome.logits)
    if difference is not None and difference > SAME:
        raise ValueError(
            f"the plain model's logits differ from the quantizer's own by {difference:.3g} of their spread"
        )
    model.save_pretrained(job.output)
    job.tokenizer().save_pretrained(job.output)
    return difference


@torch.no_grad()
def first_logits(model: nn.Module, windows: Tensor) -> Tensor:
    """Logits of the first window by a model, float32 [T, V] on the CPU."""
    return model(input_ids=windows[:1].to(next(model.parameters()).device)).logits[0].float().cpu()


def _difference(model: nn.Module, windows: Tensor, expected: Tensor) -> float:
    """Root mean square of the logits' difference, relative to their standard deviation."""
    return ((first_logits(model, windows) - expected).square().mean().sqrt() / expected.std()).item()


def _version(package: str) -> str:
    """As installed, or as the imported package says that runs from a source tree."""
    try:
        return version(package)
    except PackageNotFoundError:
        return sys.modules[package].__version__


def run(quantize: Callable[[Job], Outcome], packages: list[str]) -> None:
    """Do the job whose file is the command line's argument; the facts are written when all is done."""
    job = Job.read(Path(sys.argv[1]))
    outcome = quantize(job)
    difference = _save(job, outcome)
    cuda = job.device.startswith("cuda")
    facts = {
        "group_size": outcome.group_size,
        "bits_per_weight": round(outcome.bits_per_weight, 3),
        "activations": outcome.activations,
        "seconds": round(outcome.seconds, 1),
        **({} if difference is None else {"own_logits": float(f"{difference:.2g}")}),
        "gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
        "versions": {name: _version(name) for name in ("torch", "transformers", *packages)},
    }
    Path(job.output, "facts.json").write_text(json.dumps(facts))
