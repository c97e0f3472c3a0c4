"""The ways to run a block's experts from their codes, in order of preference, and the functions that choose from them."""

from __future__ import annotations

from collections.abc import Collection

import torch

from ..spec.linear import LinearLayout
from .cpu_experts import CpuExperts
from .experts_base import Experts
from .table import DENSE, Explanation
from .triton_experts import TritonExperts

EXPERTS: tuple[type[Experts], ...] = (TritonExperts, CpuExperts)


def choose_experts(
    layouts: Collection[LinearLayout], device: torch.device, dtype: torch.dtype, per_expert: bool = False
) -> type[Experts] | None:
    """Return what runs experts whose linears have these layouts; None if they must be decoded.

    dtype: of the activations; per_expert: whether each expert has a transform of its own.
    """
    for one in EXPERTS:
        if all(one.refusal(layout, device, dtype, per_expert) is None for layout in layouts):
            return one
    return None


def explain_experts(
    layouts: Collection[LinearLayout], device: torch.device, dtype: torch.dtype, per_expert: bool = False
) -> Explanation:
    """Return what runs experts whose linears have these layouts, and why what comes before it in the list does not; for the
    arguments see `choose_experts`. Rounded activations, whose format the layouts share, are multiplied in 16 bits everywhere.
    """
    chosen = choose_experts(layouts, device, dtype, per_expert)
    refusals = {}
    for one in EXPERTS if chosen is None else EXPERTS[: EXPERTS.index(chosen)]:
        reasons = {one.refusal(layout, device, dtype, per_expert) for layout in layouts}
        some_run = (
            "runs all weights of a block's experts or none, and not some of these: it " if None in reasons else ""
        )
        refusals[one.name] = some_run + "; ".join(sorted(reason for reason in reasons if reason))
    return Explanation(DENSE.name if chosen is None else chosen.name, refusals, next(iter(layouts)).activations)
