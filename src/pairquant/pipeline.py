"""The main job on one page: source → checks → calibration → walk → checkpoint.

Everything that can be refused is refused before the weights are loaded.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from . import __version__
from .checkpoint.read import ModelFiles
from .checkpoint.write import require_free, require_space, write_checkpoint
from .config import CheckpointConfig, QuantConfig, matches
from .devices import resolve_device
from .errors import ConfigError, ResourceError, SourceError, did_you_mean
from .layout import SUPPORTED_GROUP_SIZES, LinearLayout, bits_per_weight
from .nn import RotatedLinear, replace_module
from .optimize.calibration import Calibration, calibrate
from .optimize.capture import Block, find_blocks
from .optimize.layerwise import BlockResult, needs_text, quantize_blocks


class Progress(Protocol):
    """What `quantize` tells while it works. The default says nothing."""

    def stage(self, text: str) -> None: ...
    def plan(self, blocks: int, linears: int) -> None: ...
    def block(self, result: BlockResult) -> None: ...


class Silent:
    def stage(self, text: str) -> None: ...
    def plan(self, blocks: int, linears: int) -> None: ...
    def block(self, result: BlockResult) -> None: ...


@dataclass(frozen=True)
class QuantizationSummary:
    """What came out. sizes in bytes; errors: relative output error by linear path."""

    output: Path
    config: QuantConfig
    bits_per_weight: float
    size_before: int
    size_after: int
    seconds: float
    errors: dict[str, float]


def quantize(
    model: str | Path,
    output: str | Path,
    config: QuantConfig | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> QuantizationSummary:
    """Quantize a model and write the checkpoint to `output`.

    model: a Transformers directory, a hub name, or a `.gguf` file; device: "auto", "cpu", "cuda", "cuda:1", ….
    Raises a `PairQuantError` that says what to mend; whatever happens, an incomplete output is never left behind.
    """
    start = time.perf_counter()
    config, output, progress = config or QuantConfig(), Path(output), progress or Silent()
    require_free(output, overwrite)
    target = resolve_device(device)
    files = ModelFiles.find(str(model), trust_remote_code)
    files.require_plain()
    tokenizer = files.tokenizer()
    config, blocks = _plan(files.skeleton(), config)
    progress.plan(len(blocks), sum(len(block.linears) for block in blocks))
    require_space(output, files.size_bytes())

    calibration = None
    if needs_text(config):
        progress.stage("calibration text")
        calibration = calibrate(tokenizer, config.calibration, config.samples, config.seq_len, config.seed)
    progress.stage("loading weights")
    network = files.model()
    _require_finite(network, config)

    results = []
    with _out_of_memory_explained(config):
        for result in quantize_blocks(network, calibration.tokens if calibration else None, config, target):
            results.append(result)
            progress.block(result)

    progress.stage("writing")
    checkpoint = _checkpoint_config(network, config, results, calibration, files)
    _install(network, results, checkpoint)
    seconds = time.perf_counter() - start
    report = _report(config, results, calibration, files, seconds)
    write_checkpoint(output, network, tokenizer, report, overwrite)
    size_after = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    errors = {path: error for result in results for path, error in result.errors.items()}
    return QuantizationSummary(
        output, config, report["bits_per_weight"], files.size_bytes(), size_after, seconds, errors
    )


def _plan(skeleton: nn.Module, config: QuantConfig) -> tuple[QuantConfig, list[Block]]:
    """Resolve the group size and check every linear's shape, on a model without weights."""
    blocks = find_blocks(skeleton, config.ignore)
    _require_known_patterns(skeleton, config)
    linears = {path: linear for block in blocks for path, linear in block.linears.items()}
    if not linears:
        raise ConfigError(f"ignore {', '.join(config.ignore)} leaves no linear layer to quantize")
    inputs = {linear.in_features for linear in linears.values()}
    dividing = [g for g in SUPPORTED_GROUP_SIZES if all(c % g == 0 for c in inputs)]
    if config.group_size == "auto" and dividing:
        config = config.with_group_size(dividing[-1])
    layout_of = config if config.group_size != "auto" else config.with_group_size(SUPPORTED_GROUP_SIZES[0])
    faults = {path: layout_of.layout(m.in_features, m.out_features).misfits() for path, m in linears.items()}
    faults = {path: reasons for path, reasons in faults.items() if reasons}
    if faults:
        suggestion = f"--group-size {dividing[-1]}" if dividing else "a smaller --group-size (none divides all layers)"
        raise ConfigError(
            f"{len(faults)} of {len(linears)} linear layers do not fit:\n{_grouped_by_reason(faults)}\n"
            f"Remedies: {suggestion}, or leave these layers as they are with --ignore."
        )
    return config, blocks


def _grouped_by_reason(faults: dict[str, list[str]]) -> str:
    """One line per kind of layer: how many, which, why."""
    lines = []
    for reason, count in Counter("; ".join(reasons) for reasons in faults.values()).items():
        paths = [path for path, reasons in faults.items() if "; ".join(reasons) == reason]
        lines.append(f"  {count} × {reason}:\n    " + "\n    ".join(paths))
    return "\n".join(lines)


def _require_known_patterns(skeleton: nn.Module, config: QuantConfig) -> None:
    """A pattern that names nothing is a typing error; found now, not after hours."""
    paths = [path for path, module in skeleton.named_modules() if path]
    for pattern in config.ignore:
        if pattern not in QuantConfig.ignore and not any(matches(path, (pattern,)) for path in paths):
            names = {part for path in paths for part in (path, path.rpartition(".")[2])}
            raise ConfigError(f"ignore pattern {pattern!r} names no module of this model{did_you_mean(pattern, names)}")


def _require_finite(network: nn.Module, config: QuantConfig) -> None:
    for block in find_blocks(network, config.ignore):
        for path, linear in block.linears.items():
            if not linear.weight.isfinite().all():
                bad = int((~linear.weight.isfinite()).sum())
                raise SourceError(f"{path}.weight has {bad} values that are NaN or infinite: the source is damaged.")


class _out_of_memory_explained:
    """Turns the allocator's error into what to lower."""

    def __init__(self, config: QuantConfig):
        self.config = config

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            raise ResourceError(
                f"out of memory with {self.config.samples} samples of {self.config.seq_len} tokens. Lower --samples "
                "(128 to 64 costs little accuracy) or --seq-len, or choose --device cpu."
            ) from error


def _checkpoint_config(
    network: nn.Module,
    config: QuantConfig,
    results: list[BlockResult],
    calibration: Calibration | None,
    files: ModelFiles,
) -> CheckpointConfig:
    quantized = {path for result in results for path in result.packed}
    plain = [p for p, m in network.named_modules() if isinstance(m, nn.Linear) and p not in quantized]
    return CheckpointConfig(
        bits=config.bits,
        group_size=int(config.group_size),
        rotations=config.rotations,
        zero_point=not config.symmetric,
        modules_to_not_convert=tuple(plain),
        shared_rotations=tuple(group for result in results for group in result.shared),
        provenance=_provenance(config, calibration, files),
    )


def _provenance(config: QuantConfig, calibration: Calibration | None, files: ModelFiles) -> dict[str, Any]:
    provenance = {
        "tool": f"pairquant {__version__}",
        "source": files.name,
        "preset": config.preset,
        "seed": config.seed,
    }
    if calibration is not None:
        provenance |= {
            "calibration": list(calibration.sources),
            "calibration_tokens": list(calibration.tokens.shape),
            "calibration_sha256": calibration.digest,
        }
    return provenance


def _install(network: Any, results: list[BlockResult], checkpoint: CheckpointConfig) -> None:
    """Put the packed linears into the model, as if it had been loaded from the checkpoint."""
    from .integrations.transformers import ParoQuantConfig, ParoQuantizer

    for result in results:
        for path, packed in result.packed.items():
            replace_module(network, path, RotatedLinear.from_packed(packed))
    network.hf_quantizer = ParoQuantizer(ParoQuantConfig(**checkpoint.to_dict()))
    network.config.quantization_config = network.hf_quantizer.quantization_config


def _report(
    config: QuantConfig, results: list[BlockResult], calibration: Calibration | None, files: ModelFiles, seconds: float
) -> dict[str, Any]:
    """The content of pairquant.json: recipe, provenance, and each linear's error and size."""
    layouts: dict[str, LinearLayout] = {path: p.layout for result in results for path, p in result.packed.items()}
    return {
        "config": config.to_dict(),
        "provenance": _provenance(config, calibration, files),
        "bits_per_weight": bits_per_weight(layouts.values()),
        "seconds": round(seconds, 1),
        "linears": {
            path: {"error": error, "bytes": layouts[path].stored_bits() // 8}
            for result in results
            for path, error in result.errors.items()
        },
    }
