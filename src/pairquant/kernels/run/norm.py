"""The RMSNorm of a sum, which fused kernels compute on the way: its weight, and the result in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """An RMSNorm (arXiv 1910.07467): h / sqrt(mean(h²) + eps) · weight. weight: [C], any floating dtype; eps: positive."""

    weight: Tensor
    eps: float

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of h = x + residual, and h, both [..., C] in x's dtype; they are computed in float32.

        x, residual: [..., C] of one dtype.
        """
        h = x.float() + residual.float()
        normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (normed.to(self.weight.dtype) * self.weight).to(x.dtype), h.to(x.dtype)
