"""What the command line does with a checkpoint besides running it: inspect, trace one weight, tune."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint.original import Original
from .checkpoint.read import Checkpoint, ModelFiles
from .core.linear import decode, forward, rotated_weight, transform_of
from .core.packing import unpack
from .devices import resolve_device
from .errors import ConfigError, ResourceError
from .layout import PackedLinear
from .nn import SIBLINGS

WITHOUT_WEIGHT = ": steps ① to ③ and errors are missing"


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
