"""The life of one weight, step by step, from the source to the running layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.original import Original
from ..checkpoint.read import Checkpoint, ModelFiles
from ..core.grids import grid_of
from ..core.linear import decode, forward, rotated_weight, transform_of
from ..core.packing import unpack
from ..spec.linear import PackedLinear

WITHOUT_WEIGHT = ": steps ① to ③ and errors are missing"


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
    """Return the life of one linear's weight, step by step, and a remark on where the original came from."""
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
    yield _step("④ grid", "scales", grid_of(packed).scale)
    yield _step("⑤ rounded", "codes q", unpack(packed["qweight"], layout.bits).T)
    yield _step(
        "", "(q - z) · s" if layout.weights is None else "E2M1(q) · s", rotated, error(rotated, turned), spread=True
    )
    for name, tensor in packed.tensors.items():
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
