"""How SGLang's linear layers load packed weights.

Rows are cut here, not by SGLang's loaders: where a tensor is too short, these fill up with zeros without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...spec.fields import Field
from ..packed_layers import PackedLinearMethod, Pending
from .compat import LinearMethodBase, UnquantizedLinearMethod, rank_and_size


class PairQuantLinearMethod(PackedLinearMethod, LinearMethodBase):
    """Creates, loads, checks, repacks and runs the weights of one layer of SGLang."""

    pairquant: Any  # the configuration that made it

    def rank_of(self, layer: Any) -> int:
        """Return the rank in the layer's own group of processes."""
        return rank_and_size(layer)[0]

    def by_rows(self, layer: Any, name: str, stored: Field, extra: dict[str, Any]) -> nn.Parameter:
        """Return a parameter [channels, rows] with a loader of our own."""
        parameter = nn.Parameter(torch.empty(stored.shape, dtype=stored.dtype), requires_grad=False)
        parameter.weight_loader = row_loader(layer, layer.pairquant, name)  # type: ignore[attr-defined]
        return parameter

    def process_weights_after_loading(self, layer: Any) -> None:
        """See `PackedLinearMethod`; raises `CheckpointError` also if packed weights have found no layer at all."""
        self.pairquant.require_all_claimed()
        super().process_weights_after_loading(layer)


class PlainLinearMethod(UnquantizedLinearMethod):
    """Runs a linear whose weight is plain, as SGLang does, but knows what else should have found its layer."""

    pairquant: Any

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raise `CheckpointError` if packed weights have found no layer."""
        self.pairquant.require_all_claimed()
        super().process_weights_after_loading(layer)


def row_shares(layer: Any, pending: Pending) -> list[tuple[int, int]]:
    """Return for each linear merged in a layer which share of its rows this rank has, and of how many.

    Where a layer's channels are split, its rows are not. Ranks that outnumber the heads of keys and values have shares of
    these in common.
    """
    if pending.whole != pending.layouts[0].fields():
        return [(0, 1)] * len(pending.layouts)
    if not hasattr(layer, "output_size_per_partition"):  # neither kind is split
        return [(0, 1)] * len(pending.layouts)
    rank, size = rank_and_size(layer)
    if not (copies := getattr(layer, "num_kv_head_replicas", None)):
        return [(rank, size)] * len(pending.layouts)
    kv_rank, kv_size = rank_and_size(layer, "kv_tp_group")
    return [(rank, size), *[(kv_rank // copies, kv_size // copies)] * (len(pending.layouts) - 1)]


def row_loader(layer: Any, pending: Pending, name: str) -> Callable:
    """Return what puts this rank's part of a tensor [channels, rows or words] into its place in the parameter.

    The tensor is that of one linear merged in the layer, or of several that are fused on disk, side by side. It must have
    exactly their size.
    """
    widths = [layout.fields()[name].shape[1] for layout in pending.layouts]
    whole_channels = pending.whole[name].shape[0]

    def loader(parameter: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
        pending.require_dtype(name, parameter, loaded)
        slots, shares = pending.slots(shard), row_shares(layer, pending)
        whole = [widths[slot] * shares[slot][1] for slot in slots]
        pending.require_shape(name, loaded, (whole_channels, sum(whole)))
        channels = parameter.shape[0]
        if channels != whole_channels:
            loaded = loaded.narrow(0, rank_and_size(layer)[0] * channels, channels)
        for slot, part in zip(slots, loaded.split(whole, dim=1), strict=True):
            mine = part.narrow(1, shares[slot][0] * widths[slot], widths[slot])
            parameter.data.narrow(1, sum(widths[:slot]), widths[slot]).copy_(mine)
            pending.arrived[name].add(slot)

    return loader
