"""Run a block's experts from their codes on CPUs, by PyTorch's int4 product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.run.cpu_experts import CpuExpertWeights
from ..spec.linear import LinearLayout, PackedLinear
from .cpu_int4 import CpuInt4
from .experts_base import ACTIVATIONS, Experts


@dataclass(frozen=True)
class CpuExperts(Experts):
    """A block's experts as PyTorch's int4 product reads them, which multiplies at every number of tokens.

    Assignments are sorted by expert once, for both products.
    """

    up: CpuExpertWeights
    down: CpuExpertWeights

    name = CpuInt4.name
    replaces = ("qweight",)

    @classmethod
    def refusal(
        cls, layout: LinearLayout, device: torch.device, dtype: torch.dtype, per_expert: bool = False
    ) -> str | None:
        return CpuInt4().refusal(layout, device, dtype)

    @classmethod
    def build(cls, up: Sequence[Sequence[PackedLinear]], down: Sequence[Sequence[PackedLinear]]) -> CpuExperts:
        return cls(CpuExpertWeights.build(up), CpuExpertWeights.build(down))

    def run(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        activation: str,
        between: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        tokens, runs = _by_expert(ids, self.up.count)
        output = torch.zeros(x.shape, dtype=torch.float32)
        if runs:
            joined = self.up.product(x, runs, tokens // ids.shape[1])
            inner = between(joined) if between is not None else _activated(joined, activation)
            share = weights.flatten()[tokens, None]
            output.index_add_(0, tokens // ids.shape[1], self.down.product(inner, runs) * share.float())
        return output.to(x.dtype)

    def warm_up(self, activation: str, dtype: torch.dtype) -> None:
        """Do nothing: PyTorch's products are compiled already."""


def _by_expert(ids: Tensor, experts: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Sort assignments by expert, leaving out those for none: their places in `ids.flatten()`, and each expert that has some
    with how many."""
    owners = ids.flatten().long()
    owners = torch.where((owners < 0) | (owners >= experts), experts, owners)
    counts = torch.bincount(owners, minlength=experts)[:experts].tolist()
    return owners.argsort(stable=True)[: sum(counts)], [(number, count) for number, count in enumerate(counts) if count]


def _activated(joined: Tensor, activation: str) -> Tensor:
    """Return activation(gate) · up of gate and up side by side: [A, 2 I] → [A, I]."""
    gate, up = joined.chunk(2, -1)
    return ACTIVATIONS[activation](gate) * up
