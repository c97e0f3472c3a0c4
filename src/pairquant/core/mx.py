"""MXFP4 arithmetic (see `spec.mx`): E2M1 elements, and powers of two as scales of blocks, in float32 and exact."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec.mx import E2M1, E2M1_MAX, LEAST_EXPONENT, MOST_EXPONENT


def e2m1(x: Tensor) -> Tensor:
    """Return the nearest values of E2M1, which are ±0, 0.5, 1, 1.5, 2, 3, 4, 6: half to even, saturating; float32, any shape."""
    x = x.clamp(-E2M1_MAX, E2M1_MAX)
    step = exp2(exponent(x.abs()).clamp(0, 2) - 1)  # 0.5 below 2, 1 below 4, 2 from there on
    return (x / step).round() * step


def e2m1_codes(values: Tensor) -> Tensor:
    """Return the codes of values of E2M1, float32 of any shape: uint8, the sign in the fourth bit, zero without a sign."""
    size = values.abs()
    # Between 0 and 2, 2 and 4, 4 and 6 the values lie 0.5, 1 and 2 apart.
    code = torch.minimum(torch.minimum(2 * size, size + 2), size / 2 + 4)
    return (code + 8 * (values < 0)).to(torch.uint8)


def e2m1_values(codes: Tensor) -> Tensor:
    """Return the values, float32, of E2M1 codes, integers of any shape."""
    return torch.tensor(E2M1, device=codes.device)[codes.int()]


def floor_scale(largest: Tensor) -> Tensor:
    """Return the scale of blocks whose largest magnitudes are given, by the specification's rule: 2^(floor(log2(max|x|)) - 2).

    largest: float32, any shape. At least 2^-126: of what is smaller float32 has no normal number. The largest element then is
    between 4 and 8 scales, of which 6 is the most that E2M1 has. (Section 6.3)
    """
    return exp2((exponent(largest) - 2).clamp(min=-126))


def nearest_power(x: Tensor) -> Tensor:
    """Return the powers of two nearest to x, float32 of any shape, of those that scales of weights may be.

    Numbers that are not positive give the smallest.
    """
    x = x.clamp(2.0**LEAST_EXPONENT, 2.0**MOST_EXPONENT)
    return exp2(exponent(x * (4 / 3)))  # the middle between 2^e and 2^(e+1) is 1.5 · 2^e


def exponent(x: Tensor) -> Tensor:
    """Return floor(log2(x)) of float32 numbers that are not negative, int32, exactly; -127 for zero and for subnormal ones."""
    return (x.view(torch.int32) >> 23) - 127


def exp2(exponents: Tensor) -> Tensor:
    """Return 2^exponents, float32, exactly, for int32 exponents from -126 to 127."""
    return ((exponents + 127) << 23).view(torch.float32)
