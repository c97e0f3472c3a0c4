"""Group-wise affine quantizer (method, "Quantizer"): per output row and group of g input channels

    s = (max - min) / (2^b - 1),   z = clamp(-round(min / s), 0, 2^b - 1),
    q = clamp(round(w / s) + z, 0, 2^b - 1),   ŵ = (q - z) · s.

The range always includes zero: a group of one sign would otherwise need a zero point outside 0 … 2^b - 1, and be
clipped to nothing (a constant group of 0.5 would come back as 0.00015). Symmetric: z = 2^(b-1), s = max|w| / (2^(b-1) - 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Scales are kept at least this large; fp16 still holds it to three digits.
MIN_SCALE = 1e-5


def grouped(w: Tensor, group_size: int) -> Tensor:
    """[N, C] → [N, G, g], a view."""
    return w.view(w.shape[0], -1, group_size)


def group_range(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return smallest and largest weight of each row and group, zero included: two [N, G]."""
    by_group = grouped(w, group_size)
    return by_group.amin(-1).clamp(max=0), by_group.amax(-1).clamp(min=0)  # torch.aminmax: 5 times slower on a CPU


def affine_parameters(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return range [N, G] → scale and zero point, both [N, G] in the range's dtype."""
    levels = 2**bits - 1
    if symmetric:
        half = 2 ** (bits - 1)
        scale = (torch.maximum(-low, high) / max(half - 1, 1)).clamp(min=MIN_SCALE)
        return scale, torch.full_like(scale, half)
    scale = ((high - low) / levels).clamp(min=MIN_SCALE)
    return scale, zero_point(low, scale, bits)


def zero_point(low: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the code that stands for zero when the range starts at `low`."""
    return (-(low / scale).round()).clamp(0, 2**bits - 1)


def quantize(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return nearest codes: w [N, C], scale and zero [N, G] → uint8 [N, C]."""
    by_group = w.view(*scale.shape, -1)
    codes = (by_group / scale[..., None]).round_().add_(zero[..., None]).clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8).view(w.shape)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """ŵ = (q - z) · s: codes [N, C], scale and zero [N, G] → [N, C] in scale's dtype."""
    by_group = codes.view(*scale.shape, -1)
    return ((by_group - zero[..., None]) * scale[..., None]).view(codes.shape)


class FakeQuantize(torch.autograd.Function):
    """w → ŵ with the range taken from w itself, straight-through for round and clamp.

    With rounding and clamping seen as the identity, ŵ = w + (stuff that moves only with s): each weight passes its
    gradient on, and the scale receives dŵ/ds = (q - z) - w / s, which reaches the group's extreme weights through
    s = (max - min) / (2^b - 1). Written out by hand because autograd would keep six tensors of w's size.
    """

    @staticmethod
    def forward(ctx, w: Tensor, bits: int, group_size: int, symmetric: bool) -> Tensor:  # w: [N, C]
        low, high = group_range(w, group_size)
        scale, zero = affine_parameters(low, high, bits, symmetric)
        by_group = grouped(w, group_size)
        ratio = by_group / scale[..., None]
        steps = ratio.round().add_(zero[..., None]).clamp_(0, 2**bits - 1).sub_(zero[..., None])
        ctx.save_for_backward(w, low, high, steps - ratio)
        ctx.options = bits, group_size, symmetric, scale
        return steps.mul_(scale[..., None]).view(w.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        w, low, high, scale_slope = ctx.saved_tensors
        bits, group_size, symmetric, scale = ctx.options
        grad_scale = (grouped(grad, group_size) * scale_slope).sum(-1) * (scale > MIN_SCALE)
        by_group = grouped(w, group_size)
        if symmetric:
            extreme = torch.maximum(-low, high)[..., None]
            at_extreme = by_group.abs() == extreme
            share = grad_scale[..., None] / max(2 ** (bits - 1) - 1, 1) / at_extreme.sum(-1, keepdim=True).clamp(min=1)
            grad_w = at_extreme * by_group.sign() * share
        else:
            share = grad_scale[..., None] / (2**bits - 1)
            mask = torch.empty_like(by_group)  # comparisons straight into floats save a conversion of w's size each
            torch.eq(by_group, high[..., None], out=mask)
            grad_w = mask * (share / mask.sum(-1, keepdim=True).clamp(min=1))  # tied extremes share
            torch.eq(by_group, low[..., None], out=mask)
            grad_w.addcmul_(mask, share / mask.sum(-1, keepdim=True).clamp(min=1), value=-1)
        return grad_w.view(w.shape).add_(grad), None, None, None


def fake_quantize(w: Tensor, bits: int, group_size: int, symmetric: bool = False) -> Tensor:
    """Quantize and dequantize to nearest, differentiable (see `FakeQuantize`). w: [N, C], returns the same."""
    return FakeQuantize.apply(w, bits, group_size, symmetric)
