"""Prepare packed experts for PyTorch's int4 product on CPUs, and multiply by one expert after another.

There is no second form of the codes for many tokens, as linears have one (`rows` of `cpu.CpuCodes`): experts are nearly all of a
model, and an expert gets a small part of a prompt's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.linear import Transform
from ...core.packing import pack
from ...spec.linear import LinearLayout, PackedLinear, transform_names
from .cpu import factors, int4_product, int4_weights, rotated
from .cpu_int4_form import codes_of


@dataclass(frozen=True)
class CpuExpertWeights:
    """The linears of E experts that read the same input, such as gate and up: N rows an expert altogether.

    packed: uint8 [E, N, C/2]; grid: bfloat16 [E, G, N, 2]: of each expert as in `cpu.CpuCodes`; bias: bfloat16 [E, N] or None.
    matrix: float32 [1, G, g, g] or [1, G, g, 1], `factors` of the transform that all experts share, else None. Then own is what
    each stores of its transform: its matrix is made at each use, because those of all experts would take gigabytes.
    activations: the format of `spec.activations` that the input is rounded to, None for none.
    """

    packed: Tensor
    grid: Tensor
    bias: Tensor | None
    matrix: Tensor | None
    own: tuple[tuple[Tensor, ...], ...]
    group_size: int
    activations: str | None

    @classmethod
    def build(cls, experts: Sequence[Sequence[PackedLinear]]) -> CpuExpertWeights:
        """Repack the linears of each expert, whose layouts must be equal for all experts."""
        first = experts[0][0]
        layout, rows = first.layout, sum(linear.layout.out_features for linear in experts[0])
        packed = torch.empty(len(experts), rows, layout.in_features // 2, dtype=torch.uint8)
        grid = torch.empty(len(experts), layout.num_groups, rows, 2, dtype=torch.bfloat16)
        bias = torch.empty(len(experts), rows, dtype=torch.bfloat16) if layout.bias else None
        for number, linears in enumerate(experts):
            joined = PackedLinear.joined(linears)
            packed[number], grid[number] = int4_weights(joined)
            if bias is not None:
                bias[number] = joined["bias"]
        shared = all(linears[0].shares_transform_with(first) for linears in experts)
        stored = [tuple(linears[0][name] for name in transform_names(layout)) for linears in experts]
        matrix = _matrix(stored[0], layout.group_size) if shared else None
        own = () if shared else tuple(stored)
        return cls(packed, grid, bias, matrix, own, layout.group_size, layout.activations)

    @property
    def count(self) -> int:
        """The number of experts."""
        return len(self.packed)

    def product(self, x: Tensor, runs: Sequence[tuple[int, int]], rows: Tensor | None = None) -> Tensor:
        """Transform x, bfloat16 [T, C], and multiply it by experts: [A, N].

        runs: an expert, and how many of the A rows of x it multiplies, one run after the other; rows: integers [A], which row of
        x each of these is, None if they are those of x. A transform that all experts share is applied to each row of x once.
        """
        if self.matrix is not None:
            x = self._turned(x, self.matrix)
        if rows is not None:
            x = x[rows]
        found = []
        numbers, counts = zip(*runs, strict=True)
        for expert, mine in zip(numbers, x.split(counts), strict=True):
            if self.matrix is None:
                mine = self._turned(mine, _matrix(self.own[expert], self.group_size))
            found.append(int4_product(mine, self.packed[expert], self.grid[expert], self.group_size))
            if self.bias is not None:
                found[-1] += self.bias[expert]
        return torch.cat(found)

    def _turned(self, x: Tensor, matrix: Tensor) -> Tensor:
        return rotated(x, matrix, self.activations, self.group_size)[0]

    def stored(self, expert: int, index: int, layout: LinearLayout) -> dict[str, Tensor]:
        """Return qweight of one linear of an expert, bit for bit as it was loaded; scales and zero points were kept."""
        rows = layout.out_features
        codes = codes_of(self.packed[expert], index * rows, (index + 1) * rows)
        return {"qweight": pack(codes.T.contiguous(), layout.bits)}


def _matrix(stored: Sequence[Tensor], group_size: int) -> Tensor:
    """Return `matrix` of `CpuExpertWeights` for what is stored of a transform: theta, pairs and channel_scales."""
    theta, pairs, scales = stored
    return factors(Transform.build(theta, pairs, scales, group_size))[None]
