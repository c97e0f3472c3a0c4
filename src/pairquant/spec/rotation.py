"""The transform of a weight's input, as it is stored: channel scales, and K rotations within groups of g channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .fields import CHANNELS, Field, Size, finite

MAX_ROTATIONS = 16


@dataclass(frozen=True)
class Rotation:
    """A scale for each channel, then K rotations of pairs of channels; both channels of a pair are in the same group."""

    rotations: int
    group_size: int

    def fields(self, size: Size) -> dict[str, Field]:
        """Describe the tensors.

        theta: angles in radians; pairs: channels, counted from 0 within their group; channel_scales: the factors that
        activations are multiplied by.
        """
        channels = (None, CHANNELS)
        return {
            "theta": Field(torch.float16, (self.rotations, size.in_features // 2), channels),
            "pairs": Field(torch.int16, (self.rotations, size.in_features), channels),
            "channel_scales": Field(torch.float16, (1, size.in_features), channels),
        }

    def misfits(self, size: Size) -> Iterator[str]:
        """Yield nothing: `Codes` already gives every reason."""
        yield from ()

    def faults(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        """Yield the name of each tensor with faulty values, and what is wrong with it.

        Faulty are angles and scales that are not finite, scales of zero, and pairs that are out of range or not disjoint.
        """
        for name in ("theta", "channel_scales"):
            if not finite(tensors[name]):
                yield name, "has values that are not finite"
        if not (tensors["channel_scales"] != 0).all():
            yield "channel_scales", "has zeros, but weights are divided by it"
        g = self.group_size
        local = tensors["pairs"].reshape(-1, g)
        if local.numel() == 0:
            return
        low, high = torch.aminmax(local)
        if low < 0 or high >= g:
            first = int(local[(local < 0) | (local >= g)][0])
            yield "pairs", f"has channel {first}, outside 0 to {g - 1} (group size {g})"
            return
        used = torch.zeros(local.shape, dtype=torch.bool, device=local.device)
        if not used.scatter_(-1, local.long(), True).all():
            yield "pairs", "uses a channel twice in one rotation; pairs must be disjoint"
