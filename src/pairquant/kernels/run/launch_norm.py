"""Launch linears together with what comes before them: residual + RMSNorm, or silu(gate) · up (`triton_norm`).

As in `launch`, the caller chooses the tiles and must have checked the tensors. For a `Narrow` choice, of up to 8 tokens, what
comes before is computed with the rotation, which saves a launch. For more tokens that was slower than a kernel of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch
from .launch import cdiv, dependent, next_power_of_two, overlaps
from .norm import Norm
from .start import start
from .table import Narrow, Product
from .triton_norm import add_norm_kernel, norm_givens_kernel, silu_kernel
from .weights import KernelWeights

#: For `add_norm_kernel`: channels that a warp computes. For `silu_kernel`: those of a program of four warps.
NORM_WIDTH, SILU_WIDTH = 512, 1024


def norm_linear(
    x: Tensor,
    residual: Tensor,
    norm: Norm,
    weights: KernelWeights,
    bias: Tensor | None,
    choice: Product,
) -> tuple[Tensor, Tensor]:
    """Run linears on the norm of h = x + residual; return their output [M, sum of out_features], and h [M, C].

    x, residual: [M, C], both of one 16-bit dtype, which the results have too.
    """
    if isinstance(choice, Narrow) and x.dtype == torch.bfloat16:  # float16 may not hold what has not been normalized
        x_rot, h, squares = rotate_sum(x, residual, norm, weights, overlaps(choice, weights.rotation.transforms))
        return launch.product(x_rot, weights, bias, choice, squares), h
    normed, h = add_norm(x, residual, norm)
    return launch.linear(normed, weights, bias, choice), h


def silu_linear(x: Tensor, weights: KernelWeights, bias: Tensor | None, choice: Product) -> Tensor:
    """Run linears on silu(gate) · up, where x [M, 2 C] is gate and up side by side: [M, sum of out_features]."""
    if isinstance(choice, Narrow):
        rotation = weights.rotation
        x_rot = launch.rotate_padded(x, rotation, False, overlaps(choice, rotation.transforms), "silu")
        return launch.product(x_rot, weights, bias, choice)
    return launch.linear(silu(x), weights, bias, choice)


def rotate_sum(
    x: Tensor, residual: Tensor, norm: Norm, weights: KernelWeights, overlap: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate h times the norm's weight, not yet normalized, by all T transforms; overlap: whether the product may start meanwhile.

    Returns it for a `Narrow` choice, [T, M, 128 KB]; h [M, C]; and float32 [M, KB], whose sums over KB are mean(h²) + eps.
    """
    rotation, (tokens, channels) = weights.rotation, x.shape
    blocks, transforms = rotation.coefficients.shape[1], rotation.transforms
    out = torch.empty(transforms, tokens, blocks * 128, dtype=x.dtype, device=x.device)
    h = torch.empty(tokens, channels, dtype=x.dtype, device=x.device)
    squares = torch.empty(tokens, blocks, dtype=torch.float32, device=x.device)
    rows, early = launch.givens_rows(tokens, x.device), dependent(x.device)
    read = (x, residual, norm.weight, rotation.coefficients, rotation.partners, rotation.scales)
    start(
        norm_givens_kernel,
        (blocks, cdiv(tokens, rows), transforms),
        (*read, out, h, squares),
        (norm.eps, tokens, channels // 32, x.stride(0), residual.stride(0), blocks),
        K=rotation.rotations,
        TOKENS=rows,
        TRIGGER=early["DEPENDENT"] and overlap,
        num_warps=1,
        **early,
    )
    return out, h, squares


def add_norm(x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return the norm of h = x + residual, and h, both [M, C] in x's dtype."""
    tokens, channels = x.shape
    normed, h = (torch.empty(tokens, channels, dtype=x.dtype, device=x.device) for _ in range(2))
    width = next_power_of_two(channels)
    start(
        add_norm_kernel,
        (tokens, 1, 1),
        (x, residual, norm.weight, normed, h),
        (norm.eps, channels, x.stride(0), residual.stride(0)),
        WIDTH=width,
        num_warps=min(16, max(1, width // NORM_WIDTH)),
        **dependent(x.device),
    )
    return normed, h


def silu(x: Tensor) -> Tensor:
    """Return silu(gate) · up of x [M, 2 C]: [M, C]."""
    tokens, channels = x.shape[0], x.shape[1] // 2
    out = torch.empty(tokens, channels, dtype=x.dtype, device=x.device)
    grid, options = (tokens, cdiv(channels, SILU_WIDTH), 1), dependent(x.device)
    start(silu_kernel, grid, (x, out), (channels, x.stride(0)), WIDTH=SILU_WIDTH, num_warps=4, **options)
    return out
