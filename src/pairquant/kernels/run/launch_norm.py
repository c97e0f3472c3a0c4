"""Launch linears together with what comes before them: residual + RMSNorm, or silu(gate) · up (`triton_norm`).

As in `launch`, the caller chooses the tiles and must have checked the tensors. Where a choice has no kernel that does both,
what comes before is computed by a kernel of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...support.devices import current
from . import launch
from .launch import cdiv, dependent, features, overlaps, power_of_two
from .table import Dense, Narrow, Wide
from .triton_norm import add_norm_kernel, norm_dense_rotate_kernel, norm_givens_kernel, silu_kernel
from .weights import KernelWeights

#: For `silu_kernel`: channels of a program.
SILU_WIDTH = 1024
#: For `norm_dense_rotate_kernel`: tokens of a program, and from how many tokens on it has the larger number.
FEW_ROWS, MANY_ROWS, MANY_FROM = 16, 64, 65


def norm_linear(
    x: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    weights: KernelWeights,
    bias: Tensor | None,
    choice: Narrow | Wide | Dense,
) -> tuple[Tensor, Tensor]:
    """Run linears on the norm of h = x + residual; return their output [M, sum of out_features], and h [M, C].

    x, residual: [M, C], both of one 16-bit dtype, which the results have too; norm: [C], the weight of the norm, any dtype.
    """
    if isinstance(choice, Dense) or x.dtype != torch.bfloat16:  # float16 may not hold what has not been normalized
        normed, h = add_norm(x, residual, norm, eps)
        return launch.linear(normed, weights, bias, choice), h
    x_rot, h, squares = rotate_sum(choice, x, residual, norm, eps, weights)
    return launch.product(x_rot, weights, bias, choice, squares), h


def silu_linear(x: Tensor, weights: KernelWeights, bias: Tensor | None, choice: Narrow | Wide | Dense) -> Tensor:
    """Run linears on silu(gate) · up, where x [M, 2 C] is gate and up side by side: [M, sum of out_features]."""
    if isinstance(choice, Dense):
        return launch.linear(silu(x), weights, bias, choice)
    rotation = weights.rotation
    overlap = overlaps(choice, rotation.transforms)
    x_rot = launch.rotate_padded(x, rotation, isinstance(choice, Wide), overlap, "silu")
    return launch.product(x_rot, weights, bias, choice)


def rotate_sum(
    choice: Narrow | Wide, x: Tensor, residual: Tensor, norm: Tensor, eps: float, weights: KernelWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate h · w, not yet normalized, by all T transforms, for the kernel of `choice`.

    Returns it as `launch.rotate_for` does, [T, M, 128 KB]; h [M, C]; and float32 [M, KB], whose sums over KB are mean(h²) + eps.
    """
    rotation, (tokens, channels) = weights.rotation, x.shape
    blocks, transforms = rotation.coefficients.shape[1], rotation.transforms
    out = torch.empty(transforms, tokens, blocks * 128, dtype=x.dtype, device=x.device)
    h = torch.empty(tokens, channels, dtype=x.dtype, device=x.device)
    squares = torch.empty(tokens, blocks, dtype=torch.float32, device=x.device)
    sizes = (eps, tokens, channels // 32, x.stride(0), residual.stride(0), blocks)
    wide = isinstance(choice, Wide)
    overlap = dependent(x.device, overlaps(choice, transforms))
    with current(x.device):
        if wide and rotation.rotations and rotation.matrix is not None:
            rows = MANY_ROWS if tokens >= MANY_FROM else FEW_ROWS
            grid = (blocks, cdiv(tokens, rows), transforms)
            norm_dense_rotate_kernel[grid](
                x, residual, norm, rotation.matrix, out, h, squares, *sizes,
                TOKENS=rows, NATIVE=features(x.device)["NATIVE"], num_warps=4, **overlap,
            )  # fmt: skip
        else:
            rows = launch.givens_rows(tokens, x.device)
            grid = (blocks, cdiv(tokens, rows), transforms)
            norm_givens_kernel[grid](
                x, residual, norm, rotation.coefficients, rotation.partners, rotation.scales, out, h, squares, *sizes,
                K=rotation.rotations, TOKENS=rows, MMA_ORDER=wide, num_warps=1, **overlap,
            )  # fmt: skip
    return out, h, squares


def add_norm(x: Tensor, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of h = x + residual, and h, both [M, C] in x's dtype."""
    tokens, channels = x.shape
    normed, h = (torch.empty(tokens, channels, dtype=x.dtype, device=x.device) for _ in range(2))
    width = power_of_two(channels)
    with current(x.device):
        add_norm_kernel[(tokens,)](
            x, residual, norm, normed, h, eps, channels, x.stride(0), residual.stride(0),
            WIDTH=width, num_warps=min(16, max(1, width // 512)),
        )  # fmt: skip
    return normed, h


def silu(x: Tensor) -> Tensor:
    """Return silu(gate) · up of x [M, 2 C]: [M, C]."""
    tokens, channels = x.shape[0], x.shape[1] // 2
    out = torch.empty(tokens, channels, dtype=x.dtype, device=x.device)
    with current(x.device):
        silu_kernel[(tokens, cdiv(channels, SILU_WIDTH))](x, out, channels, x.stride(0), WIDTH=SILU_WIDTH, num_warps=4)
    return out
