"""The group-wise affine quantizer (docs/method.md, "Quantizer"). For each output row and group of g input channels:

    s = (max - min) / (2^b - 1),   z = clamp(-round(min / s), 0, 2^b - 1),
    q = clamp(round(w / s) + z, 0, 2^b - 1),   ŵ = (q - z) · s.

The range always includes zero. Otherwise a group whose weights all have the same sign would need a zero point outside
0 … 2^b - 1, and clamping it would destroy the weights (a constant group of 0.5 would come back as 0.00015).
The symmetric quantizer has z = 2^(b-1) and s = max|w| / (2^(b-1) - 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The smallest scale; smaller ones are raised to it. fp16 stores this number to three digits.
MIN_SCALE = 1e-5


def grouped(w: Tensor, group_size: int) -> Tensor:
    """View w [N, C] as [N, G, g]."""
    return w.view(w.shape[0], -1, group_size)


def group_range(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest weight of each row and group, at most and at least zero: two tensors [N, G]."""
    by_group = grouped(w, group_size)
    return by_group.amin(-1).clamp(max=0), by_group.amax(-1).clamp(min=0)  # torch.aminmax is 5 times slower on a CPU


def affine_parameters(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero point for ranges `low` to `high` [N, G]: both [N, G], in the dtype of `low`."""
    levels = 2**bits - 1
    if symmetric:
        half = 2 ** (bits - 1)
        scale = (torch.maximum(-low, high) / max(half - 1, 1)).clamp(min=MIN_SCALE)
        return scale, torch.full_like(scale, half)
    scale = ((high - low) / levels).clamp(min=MIN_SCALE)
    return scale, zero_point(low, scale, bits)


def zero_point(low: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the code that stands for zero if the range starts at `low` [N, G]: [N, G], in the dtype of `low`."""
    return (-(low / scale).round()).clamp(0, 2**bits - 1)


def quantize(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the codes of the nearest grid points: uint8 [N, C], for w [N, C], scale and zero [N, G]."""
    by_group = w.view(*scale.shape, -1)
    codes = (by_group / scale[..., None]).round_().add_(zero[..., None]).clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8).view(w.shape)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Compute ŵ = (q - z) · s: [N, C] in scale's dtype, for codes [N, C], scale and zero [N, G]."""
    by_group = codes.view(*scale.shape, -1)
    return ((by_group - zero[..., None]) * scale[..., None]).view(codes.shape)


class FakeQuantize(torch.autograd.Function):
    """Compute ŵ from w, with the range of w itself; the gradient treats round and clamp as the identity.

    Then the gradient of ŵ passes unchanged to w. The scale also receives a gradient, by dŵ/ds = (q - z) - w / s; it passes
    to the largest and the smallest weight of the group, because s = (max - min) / (2^b - 1). The backward pass is written
    by hand because autograd would keep six tensors of w's size.
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
            mask = torch.empty_like(by_group)  # float, so that no comparison needs a conversion of w's size
            torch.eq(by_group, high[..., None], out=mask)
            # If several weights have the extreme value, they share the gradient.
            grad_w = mask * (share / mask.sum(-1, keepdim=True).clamp(min=1))
            torch.eq(by_group, low[..., None], out=mask)
            grad_w.addcmul_(mask, share / mask.sum(-1, keepdim=True).clamp(min=1), value=-1)
        return grad_w.view(w.shape).add_(grad), None, None, None


def fake_quantize(w: Tensor, bits: int, group_size: int, symmetric: bool = False) -> Tensor:
    """Round w [N, C] to the nearest grid points and return their values ŵ [N, C]; differentiable (see `FakeQuantize`)."""
    return FakeQuantize.apply(w, bits, group_size, symmetric)
