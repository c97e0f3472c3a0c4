"""Prepare packed experts for the Triton kernels: what all of them read is merged and repacked, expert after expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...spec.linear import LinearLayout, PackedLinear
from .layout import KernelLayout
from .weights import KernelWeights, repacked


@dataclass(frozen=True)
class ExpertWeights:
    """The linears of E experts that read the same input, such as gate and up; all share one transform.

    each: `KernelWeights` whose words, int32 [E · NP / 16, KB, 64 b], are those of expert after expert, and whose grid is
    int32 [E, KB · S, NP]; out_features: of one expert's linears.
    bias: float16 [E, N] or None; activations: the format of `spec.activations` that the input is rounded to, "" for none.
    """

    each: KernelWeights
    count: int
    bias: Tensor | None = None
    activations: str = ""

    @classmethod
    def build(cls, experts: Sequence[Sequence[PackedLinear]]) -> ExpertWeights:
        """Repack the linears of each expert, whose layouts must be equal for all experts."""
        first, count = KernelWeights.build(experts[0]), len(experts)
        words, grid = repacked([linear for linears in experts for linear in linears])
        grid = grid.view(len(grid), count, -1).transpose(0, 1).contiguous()
        bias = None
        if experts[0][0].bias is not None:
            bias = torch.stack([torch.cat([linear["bias"] for linear in linears]) for linears in experts])
        each = replace(first, words=words, grid=grid, arrivals=words.new_empty(0))
        return cls(each, count, bias, experts[0][0].layout.activations or "")

    @property
    def layout(self) -> KernelLayout:
        """That of one expert."""
        return self.each.layout

    def stored(self, expert: int, index: int, layout: LinearLayout) -> dict[str, Tensor]:
        """Return qweight, qzeros and scales of one linear of an expert, bit for bit as they were loaded."""
        rows = self.layout.padded_rows // 16
        words = self.each.words[expert * rows : (expert + 1) * rows]
        return replace(self.each, words=words, grid=self.each.grid[expert]).stored(index, layout)

    def tensors(self) -> list[Tensor]:
        """Return all tensors in one list, which `of_tensors` reads: the bias is the last of them, empty if there is none."""
        return [*self.each.tensors(), self.each.words.new_empty(0) if self.bias is None else self.bias]

    @classmethod
    def of_tensors(
        cls, tensors: Sequence[Tensor], out_features: Sequence[int], group_size: int, activations: str = ""
    ) -> ExpertWeights:
        """Return the weights whose `tensors()` is this list; out_features: of one expert's linears."""
        *each, bias = tensors
        weights = KernelWeights.of_tensors(each, out_features, group_size)
        return cls(weights, len(weights.grid), bias if bias.numel() else None, activations)
