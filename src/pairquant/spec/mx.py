"""MXFP4, for weights and for activations: 4-bit floats in blocks of 32 with one power of two for each block.

The floats are E2M1: a sign, two bits of exponent and one of mantissa (OCP Microscaling Formats specification v1.0, sections
5.2 and 5.3). The power of two is stored as E8M0: a byte that holds the exponent plus 127.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .codes import Codes
from .fields import CHANNELS, ROWS, Field, Size

#: The sixteen values of E2M1, by their code, and the largest of them.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E2M1_MAX = 6.0
#: Channels of a block, which share a power of two.
MX_BLOCK = 32
#: What E8M0 adds to an exponent.
E8M0_BIAS = 127
#: The exponents that scales of weights may have: with them float16 holds every weight exactly, so that kernels may decode to it.
LEAST_EXPONENT, MOST_EXPONENT = -23, 13
#: The formats that a weight may have instead of whole numbers, in the order in which `LinearLayout.numbers` counts them, from
#: 1; 0 is whole numbers. Only ever add at the end.
WEIGHT_FORMATS = ("mxfp4",)


@dataclass(frozen=True)
class MxCodes:
    """The codes of a weight in MXFP4, in the order of `Codes` at 4 bits, and a scale for each row and 32 channels: 4.25 bits.

    group_size: channels that are rotated with one another, a multiple of `MX_BLOCK`. Exponents are packed as codes of 8 bits
    are, four rows in a word. So `scales` has another dtype and shape than that of `Codes`, and a reader that does not know
    this form cannot take one for the other.
    """

    group_size: int

    def fields(self, size: Size) -> dict[str, Field]:
        """Describe the tensors: qweight, packed E2M1 codes; scales, packed E8M0 exponents."""
        by_row = (CHANNELS, ROWS)
        return {
            "qweight": Field(torch.int32, (size.in_features, size.out_features // 8), by_row),
            "scales": Field(torch.int32, (size.in_features // MX_BLOCK, size.out_features // 4), by_row),
        }

    def misfits(self, size: Size) -> Iterator[str]:
        """Yield the reasons, in words, why a linear of this size cannot be stored with these codes."""
        yield from Codes(4, self.group_size).misfits(size)

    def faults(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        """Yield the scales if an exponent is outside `LEAST_EXPONENT` to `MOST_EXPONENT`, and what is wrong with them."""
        low, high = (int(x) - E8M0_BIAS for x in tensors["scales"].contiguous().view(torch.uint8).aminmax())
        if low < LEAST_EXPONENT or high > MOST_EXPONENT:
            yield (
                "scales",
                f"has exponents from {low} to {high}, allowed: {LEAST_EXPONENT} to {MOST_EXPONENT}",
            )
