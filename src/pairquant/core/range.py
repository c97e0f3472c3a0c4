"""Weights whose group scales fp16 cannot hold: a power of two moved from the weight into its channel scales."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..support.errors import ConfigError
from .grid import MIN_SCALE

#: Group scales are kept between these: far from `MIN_SCALE`, below which they are clamped, and from fp16's largest
#: number, 65504. Weights of ordinary models lie well inside.
SMALLEST_TYPICAL_SCALE, LARGEST_SCALE = 4 * MIN_SCALE, 8192.0
#: The typical scale that a weight too small is brought to.
AIM = 1e-3
#: Powers of two that channel scales, themselves fp16 and a few times larger or smaller, can take over. 2⁻¹⁴ is fp16's
#: smallest number of full precision.
LEAST_EXPONENT, MOST_EXPONENT = -14, 12


def extent(weight: Tensor) -> tuple[float, float]:
    """Root mean square and largest magnitude of a weight [N, C]; zeros for one without values."""
    if not weight.numel():
        return 0.0, 0.0
    return weight.float().square().mean().sqrt().item(), weight.abs().max().item()


def power_of_two(rms: float, peak: float, bits: int) -> float:
    """Return what to divide a weight by so that its group scales fit fp16; 1.0 for nearly every weight.

    rms, peak: see `extent`. Raises `ConfigError` for weights that no power of two brings into range.
    """
    levels = 2**bits - 1
    typical, largest = 6 * rms / levels, 2 * peak / levels  # a group spans about six standard deviations
    exponent = 0
    if largest > LARGEST_SCALE:
        exponent = math.ceil(math.log2(largest / LARGEST_SCALE))
    elif 0 < typical < SMALLEST_TYPICAL_SCALE:
        exponent = max(LEAST_EXPONENT, math.floor(math.log2(typical / AIM)))
    factor = 2.0**exponent
    if exponent > MOST_EXPONENT or (exponent < 0 and typical / factor < MIN_SCALE):
        size = f"as large as {peak:.3g}" if exponent > 0 else f"as small as {rms:.3g} (root mean square)"
        raise ConfigError(
            f"has values {size}, which scales in fp16 cannot represent. Rescale the layer and its neighbour in the source "
            "model, or leave it as it is"
        )
    return factor


def require_representable(weight: Tensor, bits: int) -> None:
    """Refuse a weight that no scales in fp16 can represent; raises `ConfigError`."""
    power_of_two(*extent(weight), bits)


def require_fp16(bias: Tensor) -> None:
    """Refuse a bias with values beyond fp16's largest; raises `ConfigError`."""
    if (peak := extent(bias)[1]) > torch.finfo(torch.float16).max:
        raise ConfigError(f"has values as large as {peak:.3g}, more than fp16 holds. Leave the layer as it is")
