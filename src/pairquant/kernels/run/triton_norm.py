"""Triton kernels for what comes before a linear: residual + RMSNorm (arXiv 1910.07467), and silu(gate) · up.

For up to 8 tokens the norm is computed with the rotation. With h = x + residual, C channels, the norm's weight w, and the scales
and the rotation of docs/method.md, the linear computes for each token

    y = (h / r · w · diag(1/a)) R Ŵᵀ = (h · w · diag(1/a)) R Ŵᵀ / r        where r = sqrt(mean(h²) + eps)

So a program rotates its block of 128 channels of h · w without knowing the others, and stores its part of r². The product
(`triton_linear.narrow_kernel`) adds up the parts and divides by r at its end. Not so in float16, which may not hold h · w.
For more tokens, what comes before has a kernel of its own, which lets the rotation start and load its matrix meanwhile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from .triton_rotate import load_input, load_steps, rotate_block


@triton.jit
def inverse_root(parts):
    """Return 1/r of each token from the parts of r², float32 [TOKENS, blocks]."""
    return tl.rsqrt(tl.sum(parts, 1))


@triton.jit(do_not_specialize=["tokens", "runs", "blocks"])
def norm_givens_kernel(
    x_ptr,  # [M, C], row stride x_stride
    residual_ptr,  # [M, C], row stride residual_stride
    norm_ptr,  # [C]: w
    coefficients_ptr,  # float32 [T, KB, K, 2, 128]
    partners_ptr,  # int32 [T, KB, K, 128]
    scales_ptr,  # [T, C]: 1/a
    out_ptr,  # [T, M, 128 KB]
    sum_ptr,  # [M, C]: h
    squares_ptr,  # float32 [M, KB]: parts of r²; the first block's has the eps
    eps,
    tokens,
    runs,  # C / 32
    x_stride,
    residual_stride,
    blocks,  # KB
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    TRIGGER: tl.constexpr,  # whether the next kernel may start before this one has ended
    DEPENDENT: tl.constexpr,
):
    """Add, scale and rotate one block of 128 channels of TOKENS tokens, as `triton_rotate.givens_kernel`."""
    channels = runs * 32
    block = tl.program_id(0)
    c = block * 128 + tl.arange(0, 128)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    transform = tl.program_id(2)
    factor = tl.load(norm_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    factor *= tl.load(scales_ptr + transform * channels + c, mask=c < channels, other=0.0).to(tl.float32)
    at = (transform * blocks + block) * K
    steps = load_steps(coefficients_ptr + at * 256, partners_ptr + at * 128, K)
    if DEPENDENT:
        tl_cuda.gdc_wait()
    if TRIGGER:
        tl_cuda.gdc_launch_dependents()
    here = (t < tokens)[:, None] & (c < channels)[None, :]
    token = t.to(tl.int64)[:, None]
    h = tl.load(x_ptr + token * x_stride + c[None, :], mask=here, other=0.0).to(tl.float32)
    h += tl.load(residual_ptr + token * residual_stride + c[None, :], mask=here, other=0.0).to(tl.float32)
    if transform == 0:
        tl.store(sum_ptr + token * channels + c[None, :], h.to(sum_ptr.dtype.element_ty), mask=here)
        part = tl.sum(h * h, 1) / channels + tl.where(block == 0, eps, 0.0)
        tl.store(squares_ptr + t * blocks + block, part, mask=t < tokens)
    y = rotate_block(h * factor[None, :], steps, TOKENS)
    row = (transform * tokens + token) * (blocks * 128)
    tl.store(out_ptr + row + c[None, :], y.to(out_ptr.dtype.element_ty), mask=(t < tokens)[:, None])


@triton.jit
def add_norm_kernel(
    x_ptr,
    residual_ptr,
    norm_ptr,
    out_ptr,  # [M, C]: the norm
    sum_ptr,  # [M, C]: h
    eps,
    channels,
    x_stride,
    residual_stride,
    WIDTH: tl.constexpr,  # the smallest power of two that is not below C
    DEPENDENT: tl.constexpr,
):
    """Add and normalize one token. As vLLM's RMSNorm, it rounds h / r to the dtype before it multiplies by w."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    real = c < channels
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    w = tl.load(norm_ptr + c, mask=real, other=0.0).to(tl.float32)
    if DEPENDENT:
        tl_cuda.gdc_wait()
        tl_cuda.gdc_launch_dependents()
    h = tl.load(x_ptr + t * x_stride + c, mask=real, other=0.0).to(tl.float32)
    h += tl.load(residual_ptr + t * residual_stride + c, mask=real, other=0.0).to(tl.float32)
    tl.store(sum_ptr + t * channels + c, h.to(dtype), mask=real)
    y = (h * tl.rsqrt(tl.sum(h * h, 0) / channels + eps)).to(dtype).to(tl.float32) * w
    tl.store(out_ptr + t * channels + c, y.to(dtype), mask=real)


@triton.jit
def silu_kernel(x_ptr, out_ptr, channels, x_stride, WIDTH: tl.constexpr, DEPENDENT: tl.constexpr):
    """Compute silu(gate) · up of WIDTH channels of one token: x [M, 2 C] → out [M, C]."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real = c < channels
    if DEPENDENT:
        # It never lets the rotation start early: that, and then the product, would be spread unevenly over the multiprocessors.
        tl_cuda.gdc_wait()
    y = load_input(x_ptr, t * x_stride, c, real, channels, "silu")
    tl.store(out_ptr + t * channels + c, y.to(out_ptr.dtype.element_ty), mask=real)
