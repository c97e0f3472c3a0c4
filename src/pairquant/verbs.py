"""What the command line does besides `quantize`, for use from Python: evaluate, inspect, trace one weight, load."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint.original import Original
from .checkpoint.read import Checkpoint, ModelFiles
from .core.linear import decode, forward, rotated_weight, transform_of
from .core.packing import unpack
from .devices import resolve_device
from .errors import ConfigError, ResourceError, TextError
from .evaluation.quality import measure
from .layout import PackedLinear
from .nn import SIBLINGS
from .text import BUNDLED_TEST, documents, token_windows

WITHOUT_WEIGHT = ": steps ① to ③ and errors are missing"


def load(files: ModelFiles, device: torch.device) -> Any:
    """The model, ready to run: float32 on a CPU (the fastest there), its stored dtype on a GPU."""
    return files.model(torch.float32 if device.type == "cpu" else "auto", device)


def evaluate(
    model: str | Path,
    reference: str | Path | None = None,
    texts: Iterable[str] = (),
    *,
    seq_len: int = 2048,
    max_tokens: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    on_windows: Callable[[str, int], Callable[[], None]] | None = None,
) -> dict[str, Any]:
    """Perplexity of each text, and with a reference mean token KL(reference ‖ model) in nats and top-1 agreement.

    texts: as for calibration (see `text`); by default the bundled GSM8K test problems. Each is cut into windows of
    seq_len tokens, the first max_tokens of them used. `on_windows(name, count)` is told what is coming and returns
    what to call after each window. Returns {"model", "reference", "texts": {name: {"tokens", "perplexity", "kl",
    "top1"}}, "bits_per_weight", "device", "versions"}, ready for JSON.
    """
    if seq_len < 2 or (max_tokens is not None and max_tokens < seq_len):
        raise ConfigError(f"max_tokens is {max_tokens}, seq_len {seq_len}: allowed is 2 ≤ seq_len ≤ max_tokens")
    target = resolve_device(device)
    files = ModelFiles.find(str(model), trust_remote_code)
    original = ModelFiles.find(str(reference), trust_remote_code) if reference is not None else None
    tokenizer = files.tokenizer()
    windows = {
        name: _evaluation_windows(tokenizer, name, seq_len, max_tokens) for name in (tuple(texts) or (BUNDLED_TEST,))
    }
    network = load(files, target)
    expected = load(original, target) if original else None
    if expected is not None and expected.config.vocab_size != network.config.vocab_size:
        raise ConfigError(
            f"the vocabularies differ: {network.config.vocab_size} and {expected.config.vocab_size} tokens. "
            "The reference must be the model that was quantized."
        )
    results = {}
    for name, batch in windows.items():
        quality = measure(network, batch, expected, on_windows(name, len(batch)) if on_windows else None)
        results[name] = vars(quality)
    return {
        "model": str(model),
        "reference": None if reference is None else str(reference),
        "texts": results,
        "bits_per_weight": bits_per_weight(files, network),
        "device": _device_name(target),
        "versions": _versions(),
    }


def bits_per_weight(files: ModelFiles, network: nn.Module) -> float:
    """Of a packed checkpoint: over its quantized linears. Of a plain model: its files' size over its parameters."""
    if files.quantization is not None:
        return Checkpoint.open(files).bits_per_weight()
    return files.size_bytes() * 8 / sum(p.numel() for p in network.parameters())


@dataclass(frozen=True)
class Inspection:
    """A checkpoint, all of its linears verified. linears: path → {"error" (None if not recorded), "bytes"}."""

    checkpoint: Checkpoint
    linears: dict[str, dict[str, Any]]
    size: int


def inspect(model: str | Path) -> Inspection:
    """Open a packed checkpoint and check every tensor in it; raises `CheckpointError` naming the first fault."""
    files = ModelFiles.find(str(model))
    checkpoint = Checkpoint.open(files)
    recorded = checkpoint.report.get("linears", {})
    in_order = {path: rank for rank, path in enumerate(recorded)}
    linears = {}
    for path in sorted(checkpoint.stored.linears(), key=lambda path: in_order.get(path, len(in_order))):
        packed = checkpoint.packed(path)
        error = recorded.get(path, {}).get("error")
        linears[path] = {"error": error, "bytes": packed.layout.stored_bits() // 8}
    checkpoint.check_plain()
    return Inspection(checkpoint, linears, files.size_bytes())


@dataclass(frozen=True)
class Step:
    """One step in the life of a weight. error: relative to the original weight, ‖·‖ / ‖W‖; spread: max|w| / rms."""

    name: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    spread: float | None = None
    error: float | None = None


def trace(model: str | Path, path: str) -> tuple[list[Step], str]:
    """The life of one linear's weight, step by step, and a remark on where the original came from."""
    checkpoint = Checkpoint.open(ModelFiles.find(str(model)))
    packed = checkpoint.packed(path)
    original = Original(checkpoint)
    weight = original.weight(path)
    return list(_life(packed, weight)), original.remark + ("" if weight is not None else WITHOUT_WEIGHT)


def _life(packed: PackedLinear, weight: Tensor | None) -> Iterable[Step]:
    transform, layout = transform_of(packed), packed.layout
    decoded, rotated = decode(packed), rotated_weight(packed)

    def error(approximation: Tensor, exact: Tensor | None) -> float | None:
        return None if exact is None else ((approximation - exact).norm() / exact.norm()).item()

    turned = None
    if weight is not None:
        turned = transform.weight_in(weight)
        yield _step("① source", "W", weight)
        yield _step("② scaled", "W · diag(a)", weight / transform.inverse_scales)
        yield _step("③ rotated", "(W · diag(a)) R", turned, error(transform.weight_out(turned), weight))
    yield _step("④ grid", "scales", packed.scales.T)
    yield _step("⑤ rounded", "codes q", unpack(packed.qweight, layout.bits).T)
    yield _step("", "(q - z) · s", rotated, error(rotated, turned), spread=True)
    for name, tensor in packed.tensors().items():
        yield _step("⑥ stored" if name == "qweight" else "", name, tensor)
    yield _step("⑧ decoded", "Ŵ", decoded, error(decoded, weight), spread=True)
    x = torch.randn(16, layout.in_features, generator=torch.Generator().manual_seed(0))
    y = forward(packed, x)
    bias = packed.bias.float() if packed.bias is not None else 0
    yield _step("⑨ run", "rotate(x) · ŵᵀ against x · Ŵᵀ", y, error(y, x @ decoded.T + bias))


def _step(name: str, tensor: str, value: Tensor, error: float | None = None, spread: bool | None = None) -> Step:
    weight_like = spread or tensor.startswith(("W", "(W"))
    peak = (value.abs().max() / value.square().mean().sqrt()).item() if weight_like else None
    return Step(name, tensor, str(value.dtype).removeprefix("torch."), tuple(value.shape), peak, error)


def _evaluation_windows(tokenizer, name: str, seq_len: int, max_tokens: int | None) -> Tensor:
    windows = token_windows(tokenizer, documents(name), seq_len)
    if not len(windows):
        raise TextError(f"text {name!r} is shorter than one window of {seq_len} tokens. Lower --seq-len.")
    return windows if max_tokens is None else windows[: max_tokens // seq_len]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def _versions() -> dict[str, str]:
    packages = ("pairquant", "torch", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def tune(model: str | Path, device: str = "auto") -> Iterator[tuple[tuple[int, ...], int, dict[int, Any]]]:
    """Measure the kernels' tiles for every shape of a packed checkpoint on this GPU, and keep the best in the user's table.

    Yields (out_features of the linears of one launch, in_features, {tokens: choice}) as each shape is done and saved.
    Raises `ResourceError` without an NVIDIA GPU and Triton.
    """
    from .kernels import ops, table

    target = resolve_device(device)
    if target.type != "cuda":
        raise ResourceError("measuring kernels needs an NVIDIA GPU, and none was found")
    if reason := ops.triton_missing():
        raise ResourceError(f"measuring kernels needs Triton: {reason}")
    from .kernels.tune import tune_shape

    checkpoint = Checkpoint.open(ModelFiles.find(str(model)))
    if checkpoint.config.bits != 4:
        raise ConfigError(f"the checkpoint has {checkpoint.config.bits} bits; kernels exist for 4")
    layouts = {path: checkpoint.layout(path) for path in checkpoint.stored.linears()}
    linears = {path: (s.out_features, s.in_features) for path, s in layouts.items()}
    for sizes, channels in launched_shapes(linears):
        choices = tune_shape(sizes, channels, checkpoint.config.group_size, target)
        table.save_user_table(ops.device_class(target), {(sum(sizes), channels): choices})
        yield sizes, channels, choices


def launched_shapes(linears: Mapping[str, tuple[int, int]]) -> list[tuple[tuple[int, ...], int]]:
    """Path → (out_features, in_features) of each linear to the distinct shapes that are launched, siblings merged."""
    siblings = {name: names for names in SIBLINGS for name in names}
    shapes: dict[tuple[tuple[int, ...], int], None] = {}
    for path, (rows, channels) in linears.items():
        parent, _, name = path.rpartition(".")
        group = [f"{parent}.{other}" for other in siblings.get(name, (name,))]
        if all(other in linears and linears[other][1] == channels for other in group):
            shapes[tuple(linears[other][0] for other in group), channels] = None
        else:
            shapes[(rows,), channels] = None
    return list(shapes)
