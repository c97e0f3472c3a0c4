"""Run quantized layers on a CPU: one small matrix per group holds all K rotations and the scales, then PyTorch's int4
product follows.

For one token of 4096 channels on two threads, rotating in K steps takes 226 to 325 us, the product with the matrices 20 to
36 us.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.activations import rounded
from ...core.linear import transform_of
from ...core.packing import unpack
from ...core.rotation import rotate_dense
from ...spec.linear import PackedLinear

#: PyTorch's int4 product on CPUs packs this many output rows together.
INT4_ROWS = 16


@dataclass(frozen=True)
class CpuWeights:
    """One packed linear, prepared for the CPU.

    packed: the codes as `aten::_convert_weight_to_int4pack_for_cpu` returns them; PyTorch does not document the format.
    grid: bfloat16 [G, N, 2], scale and (8 - z) · scale, because the product computes (q - 8) · scale + zero.
    matrix: float32 [G, g, g], diag(1/a) R. In bfloat16 it would add an error as large as that of rounding the activations.
    Without rotations it is [G, g, 1], the factors 1/a alone.
    """

    packed: Tensor
    grid: Tensor
    matrix: Tensor

    @classmethod
    def build(cls, linear: PackedLinear) -> CpuWeights:
        """Prepare a 4-bit linear."""
        transform = transform_of(linear)
        groups, g, _ = transform.matrix.shape
        factors = transform.inverse_scales.view(groups, g, 1)
        return cls(*int4_weights(linear), factors * transform.matrix if linear.layout.rotations else factors)

    def tensors(self) -> list[Tensor]:
        """Return the three tensors, in the order of the fields."""
        return [self.packed, self.grid, self.matrix]


def int4_weights(linear: PackedLinear) -> tuple[Tensor, Tensor]:
    """Return `packed` and `grid` of `CpuWeights`, for a 4-bit linear."""
    codes = unpack(linear["qweight"], 4).T.contiguous().to(torch.int32)
    # The zero points times the rounded scales: then the rounding of a scale does not shift the whole group.
    scales, zeros = linear["scales"].bfloat16().float(), unpack(linear["qzeros"], 4).float()
    grid = torch.stack((scales, (8 - zeros) * scales), dim=-1).bfloat16()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), grid


def int4_product(x_rot: Tensor, packed: Tensor, grid: Tensor, group_size: int) -> Tensor:
    """Multiply what is in the rotated basis already: x_rot [M, C] bfloat16 → [M, N]."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x_rot, packed, group_size, grid)


def rotated_linear(
    x: Tensor, weights: CpuWeights, bias: Tensor | None, group_size: int, activations: str | None = None
) -> Tensor:
    """Run a linear on x, bfloat16 [M, C], with its bias if it has one: bfloat16 [M, N].

    activations: the format that the rotated x is rounded to, None for none.
    """
    x_rot = _multiplied(x.float(), weights.matrix)
    if activations is not None:
        x_rot = rounded(x_rot, activations, group_size)
    y = int4_product(x_rot.to(x.dtype), weights.packed, weights.grid, group_size)
    return y if bias is None else y + bias


def decode(weights: CpuWeights, group_size: int) -> Tensor:
    """Return the dense weight, float32 [N, C]. The packed form is opaque: its product with the identity is the rotated weight."""
    eye = torch.eye(len(weights.matrix) * group_size, dtype=torch.bfloat16)
    rotated = int4_product(eye, weights.packed, weights.grid, group_size).T.float()
    return _multiplied(rotated, weights.matrix.mT if weights.matrix.shape[-1] > 1 else weights.matrix)


def _multiplied(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply each group of x [M, C] by its matrix, or each channel by its factor."""
    return rotate_dense(x, matrix) if matrix.shape[-1] > 1 else x * matrix.flatten()
