"""Round activations, in the rotated basis, to a format of `spec.activations`: the reference for every kernel.

For a span of values x with one scale s (x in float32, rounding half to even):

    int8:        s = max|x| / 127,        q = clamp(round(x / s), ±127)
    int4:        s = 0.95 · max|x| / 7,   q = clamp(round(x / s), ±7)
    fp8:         s = max|x| / 448,        q = float8_e4m3fn(x / s)
    mxfp4:       s = 2^(floor(log2(max|x|)) - 2),   q = E2M1(x / s), saturating at ±6
                 (OCP Microscaling Formats specification v1.0, section 6.3)

and the layer multiplies q · s by its rotated weight. A span of zeros has the scale `MIN_SCALE`, or for mxfp4 2^-126.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec.activations import E4M3_MAX, FORMATS
from .mx import e2m1, floor_scale

#: The share of the largest value that int4 reaches. Cutting off the rest makes the steps of all others finer: the error of
#: layers of SmolLM2 is 8 % lower than with 1, by learned and by random transforms, and rises again below 0.9.
INT4_REACH = 0.95
#: The smallest scale of int8, fp8 and int4: far below that of any activation, far above the smallest float32.
MIN_SCALE = 1e-30


def rows_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round the rows of x, floating [M, C], to int8: codes int8 [M, C] in -127 … 127, and scales float32 [M]."""
    codes, scale = _whole(x.float(), FORMATS["int8"].largest)
    return codes.to(torch.int8), scale[..., 0]


def rows_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round the rows of x, floating [M, C], to fp8: codes float8_e4m3fn [M, C], and scales float32 [M]."""
    x = x.float()
    scale = _largest(x).div(E4M3_MAX).clamp(min=MIN_SCALE)
    codes = (x / scale).clamp(-E4M3_MAX, E4M3_MAX)  # the conversion makes NaN of what is larger
    return codes.to(torch.float8_e4m3fn), scale[..., 0]


def groups_int4(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round each group of x, floating [M, C], to int4: codes int8 [M, C] in -7 … 7, and scales float32 [M, C / g]."""
    codes, scale = _whole(x.float().unflatten(-1, (-1, group_size)), FORMATS["int4"].largest, INT4_REACH)
    return codes.to(torch.int8).flatten(-2), scale[..., 0]


def mxfp4(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Round each block of x, floating [M, C], to MXFP4: elements float32 [M, C], values of E2M1, and scales float32 [M, C / block].

    The scales are powers of two, from 2^-126: of what is smaller float32 has no normal number.
    """
    by_block = x.float().unflatten(-1, (-1, block))
    scale = floor_scale(_largest(by_block))
    return e2m1(by_block / scale).flatten(-2), scale[..., 0]


def rounded(x_rot: Tensor, activations: str, group_size: int) -> Tensor:
    """Return what a layer multiplies by instead of x_rot: rounded to a format of `FORMATS` and back, float32 [..., C].

    x_rot: floating [..., C], in the rotated basis; group_size: the layer's. The gradient passes as if nothing were rounded.
    """
    if torch.is_grad_enabled() and x_rot.requires_grad:
        return _StraightThrough.apply(x_rot, activations, group_size)
    return _rounded(x_rot, activations, group_size)


def rounded_for_training(x_rot: Tensor, activations: str, group_size: int) -> Tensor:
    """Return `rounded`, with the gradient of x_rot + `noise`, which tells how errors shrink with what is rounded."""
    if torch.is_grad_enabled() and x_rot.requires_grad:
        return _WithNoise.apply(x_rot, activations, group_size)
    return _rounded(x_rot, activations, group_size)


#: Format → the share of a span's largest value below which a value's step does not shrink with it. Whole numbers have one step.
EVEN_STEPS = {"int8": 1.0, "fp8": 2.0**-6 / E4M3_MAX, "int4": 1.0, "mxfp4": 0.25}


def noise(x_rot: Tensor, activations: str, group_size: int) -> Tensor:
    """Return rounded(x_rot) - x_rot, float32 [..., C], as transforms are fitted, and models trained, on it.

    The gradient takes each error as a fixed multiple of its step, and the step as proportional to the largest value of its
    span or, where the format is a floating one, to the value itself: so it tells how errors shrink with what is rounded.
    """
    x = x_rot.float()
    with torch.no_grad():
        error = _rounded(x, activations, group_size) - x
    spans = x.unflatten(-1, (-1, FORMATS[activations].channels(x.shape[-1], group_size))).abs()
    step = torch.maximum(spans, EVEN_STEPS[activations] * spans.amax(-1, keepdim=True)).flatten(-2)
    return error / step.detach().clamp(min=MIN_SCALE) * step


def _rounded(x: Tensor, activations: str, group_size: int) -> Tensor:
    if activations == "int8":
        codes, scale = rows_int8(x)
        return codes.float() * scale[..., None]
    if activations == "fp8":
        codes, scale = rows_fp8(x)
        return codes.float() * scale[..., None]
    width = FORMATS[activations].channels(x.shape[-1], group_size)
    codes, scale = groups_int4(x, width) if activations == "int4" else mxfp4(x, width)
    return (codes.float().unflatten(-1, (-1, width)) * scale[..., None]).flatten(-2)


class _StraightThrough(torch.autograd.Function):
    """`rounded`, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x: Tensor, activations: str, group_size: int) -> Tensor:
        ctx.dtype = x.dtype
        return _rounded(x, activations, group_size)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad.to(ctx.dtype), None, None


class _WithNoise(torch.autograd.Function):
    """See `rounded_for_training`. What the gradient needs beside the input is computed again, as it takes several times as much memory."""

    @staticmethod
    def forward(ctx, x: Tensor, activations: str, group_size: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.how = activations, group_size
        return _rounded(x, activations, group_size)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(leaf + noise(leaf, *ctx.how), leaf, grad)
        return slope, None, None


def _whole(x: Tensor, largest: float, reach: float = 1.0) -> tuple[Tensor, Tensor]:
    """Round spans, the last dimension of x, to whole numbers up to `largest`: float32 codes like x, and scales [..., 1].

    reach: the share of the largest value of a span that the codes reach.
    """
    scale = _largest(x).mul(reach / largest).clamp(min=MIN_SCALE)
    return (x / scale).round().clamp(-largest, largest), scale


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True)
