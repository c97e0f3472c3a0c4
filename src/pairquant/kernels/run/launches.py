"""Packed linears that read the same input, made ready for as few calls of `pairquant::rotated_linear` as can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...spec.linear import PackedLinear
from . import cpu, ops
from .weights import MAX_SEGMENTS, KernelWeights


@dataclass(frozen=True)
class Launch:
    """One call: the operator's `weight` and `out_features`."""

    tensors: list[Tensor]
    out_features: tuple[int, ...]


def launches(linears: Sequence[PackedLinear], dtype: torch.dtype) -> list[Launch]:
    """For activations of `dtype` on the linears' device; none where there is no kernel (run them decoded then).

    On a GPU `MAX_SEGMENTS` linears go together. On a CPU those with one transform do, as one matrix.
    """
    if linears[0].layout.bits == 4 and linears[0].qweight.is_cuda and not ops.triton_missing():
        return [_on_gpu(linears[i : i + MAX_SEGMENTS]) for i in range(0, len(linears), MAX_SEGMENTS)]
    joined = _joined_where_shared(linears)
    if linears[0].qweight.device.type == "cpu" and all(cpu.available(part.layout, dtype) for part in joined):
        return [Launch(cpu.CpuWeights.build(part).tensors(), (part.layout.out_features,)) for part in joined]
    return []


def _on_gpu(linears: Sequence[PackedLinear]) -> Launch:
    from .launch import with_matrix

    weights = with_matrix(KernelWeights.build(linears))
    return Launch(weights.tensors(), weights.out_features)


def _joined_where_shared(linears: Sequence[PackedLinear]) -> list[PackedLinear]:
    """One linear where all have the same transform; they share the input already."""
    if all(linear.shares_transform_with(linears[0]) for linear in linears[1:]):
        return [PackedLinear.joined(linears)]
    return list(linears)
