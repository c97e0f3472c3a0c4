"""How vLLM's linear layers load packed weights: its own loaders cut the rows."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ...spec.fields import Field
from ...spec.linear import Spec
from ..packed_layers import PackedLinearMethod, Pending
from .compat import (
    GroupQuantScaleParameter,
    LinearMethodBase,
    PackedvLLMParameter,
    register_weight_loader_v2_supported_method,
)


@register_weight_loader_v2_supported_method
class PairQuantLinearMethod(PackedLinearMethod, LinearMethodBase):
    """Creates, loads, checks, repacks and runs the weights of one layer of vLLM.

    before: what comes before the layer and runs with it: "norm", "silu" or, if nothing does, None (see `fusion`).
    """

    def __init__(self, spec: Spec, prefix: str):
        super().__init__(spec, prefix)
        self.before: str | None = None

    def rank_of(self, layer: Any) -> int:
        """Return what vLLM has noted at the layer."""
        return layer.tp_rank

    def by_rows(self, layer: Any, name: str, stored: Field, extra: dict[str, Any]) -> nn.Parameter:
        """Return a parameter [channels, rows] that vLLM's own loaders cut along inputs (0) and outputs (1)."""
        pending: Pending = layer.pairquant
        loader = pending.counting(name, extra["weight_loader"])
        data = torch.empty(stored.shape, dtype=stored.dtype)
        cut: dict[str, Any] = {"data": data, "input_dim": 0, "output_dim": 1, "weight_loader": loader}
        rows_per_entry = Fraction(sum(layout.out_features for layout in pending.layouts), stored.shape[1])
        if rows_per_entry == 1:
            return GroupQuantScaleParameter(**cut)
        return PackedvLLMParameter(packed_dim=1, packed_factor=rows_per_entry, **cut)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., C] → [..., N]. After "norm" x is the result, [..., N]; before "silu" it is gate and up, [..., 2 C]."""
        if self.before == "norm":
            return x
        if self.before == "silu":
            return layer.pairquant.run_after_silu(layer, x, bias)
        return super().apply(layer, x, bias)
