"""The codes of a weight: b-bit whole numbers with a scale and a zero point for each row and group of g channels.

Codes are packed along the output dimension: b words of 32 bits hold 32 columns, or, where 32 / b is whole, each word
holds 32 / b columns; least significant bits first. At 4 bits the eight columns of a word are stored in AWQ's order:
nibble i holds column `AWQ_ORDER[i]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .fields import CHANNELS, ROWS, Field, Size, finite

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SUPPORTED_BITS = (2, 3, 4, 5, 6, 8)
SUPPORTED_GROUP_SIZES = (32, 64, 128)


def columns_per_block(bits: int) -> int:
    """Return the fewest output columns that fill whole 32-bit words: 8 at 4 bits, 16 at 6 bits, 32 at 3 and 5 bits."""
    return 32 // math.gcd(32, bits)


@dataclass(frozen=True)
class Codes:
    """Codes of `bits` bits with scales and zero points for groups of `group_size` input channels."""

    bits: int
    group_size: int

    def fields(self, size: Size) -> dict[str, Field]:
        """Describe the tensors: qweight, packed codes; qzeros, packed zero points; scales, one for each row and group."""
        groups, words = size.in_features // self.group_size, size.out_features * self.bits // 32
        by_row = (CHANNELS, ROWS)
        return {
            "qweight": Field(torch.int32, (size.in_features, words), by_row),
            "qzeros": Field(torch.int32, (groups, words), by_row),
            "scales": Field(torch.float16, (groups, size.out_features), by_row),
        }

    def misfits(self, size: Size) -> Iterator[str]:
        """Yield the reasons, in words, why a linear of this size cannot be stored with these codes."""
        block = columns_per_block(self.bits)
        if size.in_features % self.group_size:
            yield f"in_features {size.in_features} is not a multiple of group size {self.group_size}"
        if size.out_features % block:
            yield f"out_features {size.out_features} is not a multiple of {block} (packing at {self.bits} bits)"

    def faults(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        """Yield the name of each tensor with faulty values, and what is wrong with it."""
        if not finite(tensors["scales"]):
            yield "scales", "has values that are not finite"
