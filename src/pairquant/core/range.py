"""Find weights whose group scales cannot be stored, and the power of two to move from the weight to its channel scales."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..spec import mx
from ..spec.linear import Spec
from ..support.errors import ConfigError
from .grid import MIN_SCALE

#: Group scales are kept between these limits, which are far from `MIN_SCALE`, below which they are clamped, and from fp16's
#: largest number, 65504. The weights of ordinary models are well within them.
SMALLEST_TYPICAL_SCALE, LARGEST_SCALE = 4 * MIN_SCALE, 8192.0
#: The limit of scales of MXFP4 weights, also an eighth of the largest: a transform can make values a few times larger.
LARGEST_MX_SCALE = 2.0 ** (mx.MOST_EXPONENT - 3)
#: If a weight is too small, it is multiplied by a power of two that brings its typical scale near this.
AIM = 1e-3
#: The range of the exponent of that power of two. Channel scales are stored in fp16 too, and are a few times larger or
#: smaller than it. 2⁻¹⁴ is the smallest number that fp16 holds with full precision.
LEAST_EXPONENT, MOST_EXPONENT = -14, 12


def extent(weight: Tensor) -> tuple[float, float]:
    """Return the root mean square and the largest magnitude of a tensor; zeros if it is empty."""
    if not weight.numel():
        return 0.0, 0.0
    return weight.float().square().mean().sqrt().item(), weight.abs().max().item()


def power_of_two(rms: float, peak: float, spec: Spec) -> float:
    """Return the power of two to divide a weight by so that its group scales can be stored; 1.0 for nearly every weight.

    rms, peak: see `extent`; spec: the form in which the weight is stored. Raises `ConfigError` for a weight that no power of two brings into range. Its message begins
    with "has values", because the caller puts the weight's name before it.
    """
    floating = spec.weights is not None
    span, limit = (2 * mx.E2M1_MAX, LARGEST_MX_SCALE) if floating else (2**spec.bits - 1, LARGEST_SCALE)
    typical, largest = 6 * rms / span, 2 * peak / span  # a group spans about six standard deviations
    exponent = 0
    if largest > limit:
        exponent = math.ceil(math.log2(largest / limit))
    elif 0 < typical < SMALLEST_TYPICAL_SCALE:
        exponent = max(LEAST_EXPONENT, math.floor(math.log2(typical / AIM)))
    factor = 2.0**exponent
    if exponent > MOST_EXPONENT or (exponent < 0 and typical / factor < MIN_SCALE):
        size = f"as large as {peak:.3g}" if exponent > 0 else f"as small as {rms:.3g} (root mean square)"
        raise ConfigError(
            f"has values {size}, which {'scales of MXFP4' if floating else 'scales in fp16'} cannot represent. Rescale the layer and its neighbour in the source "
            "model, or leave it as it is"
        )
    return factor


def require_representable(weight: Tensor, spec: Spec) -> None:
    """Raise `ConfigError` for a weight that no scales of this form can represent (see `power_of_two`)."""
    power_of_two(*extent(weight), spec)


def require_fp16(bias: Tensor) -> None:
    """Raise `ConfigError` for a bias with values larger than fp16 can hold; the caller puts its name before the message."""
    if (peak := extent(bias)[1]) > torch.finfo(torch.float16).max:
        raise ConfigError(f"has values as large as {peak:.3g}, more than fp16 holds. Leave the layer as it is")
