"""Scale and rotate activations: y = (x · diag(1/a)) R, and its gradients (method, "Scaled pairwise rotation").

Per channel c of a group, with partner p(c) and the signed sine s_c of its pair, one rotation is

    y_c = cos_c · x_c + s_c · x_p(c)        inverse:  x_c = cos_c · y_c - s_c · y_p(c)

Few tokens: one warp per (group, tokens, transform) keeps its tile in registers through all K rotations; a partner is
fetched by warp shuffles. Many tokens: the shuffles would cost more than memory, so R is built once, by rotating the
identity, and multiplied on tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda


@triton.jit
def dot(a, b, NATIVE: tl.constexpr):
    """a · b in float32. The interpreter knows no bfloat16 products, so there the operands become float32."""
    if NATIVE:
        return tl.dot(a, b)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")


@triton.jit
def mma_order(c):
    """Where channel c of a run of 16 is stored for `triton_linear.wide_kernel` (see layout.KernelLayout)."""
    return (c & ~15) + ((c >> 1) & 1) * 8 + ((c >> 2) & 3) * 2 + (c & 1)


@triton.jit(do_not_specialize=["tokens", "runs", "out_runs"])
def givens_kernel(
    x_ptr,  # [M, C], row stride x_stride; not read where IDENTITY
    coefficients_ptr,  # float32 [T, K, 2, C]: cosines, signed sines
    partners_ptr,  # uint8 [T, K, C], within the group
    scales_ptr,  # [T, C]: 1/a
    out_ptr,  # [T, M, out_channels], zeros beyond C
    tokens,
    runs,  # C / 32: so written, the compiler knows what is aligned, without variants
    x_stride,
    out_runs,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    MMA_ORDER: tl.constexpr,
    IDENTITY: tl.constexpr,  # rotate the rows of one identity of this size per 128 channels; 0: rotate x
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT == 1:
        tl_cuda.gdc_launch_dependents()
    channels = runs * 32
    c = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    transform = tl.program_id(2)
    out_channels = out_runs * 32
    real = c < channels
    scale = tl.load(scales_ptr + transform * channels + c, mask=real, other=0.0).to(tl.float32)
    if DEPENDENT:
        tl_cuda.gdc_wait()
    if DEPENDENT == 2:
        tl_cuda.gdc_launch_dependents()
    if IDENTITY:
        x = tl.where(t[:, None] == (c % IDENTITY)[None, :], 1.0, 0.0)
    else:
        here = (t < tokens)[:, None] & real[None, :]
        x = tl.load(x_ptr + t.to(tl.int64)[:, None] * x_stride + c[None, :], mask=here, other=0.0).to(tl.float32)
    x = x * scale[None, :]
    for k in tl.static_range(K):
        step = (transform * K + k) * channels + c
        cos = tl.load(coefficients_ptr + step + (transform * K + k) * channels, mask=real, other=1.0)
        sin = tl.load(coefficients_ptr + step + (transform * K + k + 1) * channels, mask=real, other=0.0)
        partner = tl.load(partners_ptr + step, mask=real, other=0).to(tl.int32)
        x = cos[None, :] * x + sin[None, :] * tl.gather(x, tl.broadcast_to(partner[None, :], (TOKENS, GROUP)), axis=1)
    column = mma_order(c) if MMA_ORDER else c
    row = (transform * tokens + t).to(tl.int64)[:, None] * out_channels
    inside = (t < tokens)[:, None] & (c < out_channels)[None, :]
    tl.store(out_ptr + row + column[None, :], x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "runs", "out_runs"])
def dense_rotate_kernel(
    x_ptr,  # [M, C], row stride x_stride
    matrix_ptr,  # float16 [T, BLOCK, out_channels]: R of each block of channels, scales included
    out_ptr,  # [T, M, out_channels], zeros beyond C
    tokens,
    runs,  # C / 32: so written, the compiler knows what is aligned, without variants
    x_stride,
    out_runs,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,  # of TOKENS tokens, per program
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    NATIVE: tl.constexpr,
):
    if DEPENDENT == 1:
        tl_cuda.gdc_launch_dependents()
    channels = runs * 32
    out_channels = out_runs * 32
    transform = tl.program_id(2)
    k = tl.arange(0, BLOCK)
    c = tl.program_id(0) * BLOCK + k
    matrix = tl.load(matrix_ptr + (transform * BLOCK + k)[:, None] * out_channels + c[None, :])
    matrix = matrix.to(tl.float32).to(x_ptr.dtype.element_ty)
    if DEPENDENT:
        tl_cuda.gdc_wait()
    if DEPENDENT == 2:
        tl_cuda.gdc_launch_dependents()
    first = tl.program_id(1) * TILES
    for tile in tl.range(first, first + TILES, num_stages=STAGES):
        t = tile * TOKENS + tl.arange(0, TOKENS)
        here = (t < tokens)[:, None] & (c < channels)[None, :]
        x = tl.load(x_ptr + t.to(tl.int64)[:, None] * x_stride + c[None, :], mask=here, other=0.0)
        y = dot(x, matrix, NATIVE).to(out_ptr.dtype.element_ty)
        row = (transform * tokens + t).to(tl.int64)[:, None] * out_channels
        tl.store(out_ptr + row + c[None, :], y, mask=(t < tokens)[:, None])


@triton.jit(do_not_specialize=["tokens", "runs"])
def givens_backward_kernel(
    y_ptr,  # [T, M, C]: what the forward returned
    grad_ptr,  # [T, M, C]
    coefficients_ptr,
    partners_ptr,
    scales_ptr,
    grad_x_ptr,  # float32 [T, M, C]
    grad_coefficients_ptr,  # float32 [P, T, K, 2, C], one slice per program along the tokens
    grad_scales_ptr,  # float32 [P, T, C]
    tokens,
    runs,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
):
    channels = runs * 32
    c = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    transform = tl.program_id(2)
    slot = tl.program_id(1) * tl.num_programs(2) + transform
    here = (t < tokens)[:, None]
    at = (transform * tokens + t).to(tl.int64)[:, None] * channels + c[None, :]
    scale = tl.load(scales_ptr + transform * channels + c).to(tl.float32)
    y = tl.load(y_ptr + at, mask=here, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=here, other=0.0).to(tl.float32)
    for step in tl.static_range(K):
        stored = (transform * K + K - 1 - step) * channels
        slope = grad_coefficients_ptr + 2 * (slot * K + K - 1 - step) * channels + c
        cos = tl.load(coefficients_ptr + 2 * stored + c)[None, :]
        sin = tl.load(coefficients_ptr + 2 * stored + channels + c)[None, :]
        partner = tl.broadcast_to(tl.load(partners_ptr + stored + c).to(tl.int32)[None, :], (TOKENS, GROUP))
        y = cos * y - sin * tl.gather(y, partner, axis=1)  # from here on, this rotation's input
        tl.store(slope, tl.sum(grad * y, axis=0))
        tl.store(slope + channels, tl.sum(grad * tl.gather(y, partner, axis=1), axis=0))
        grad = cos * grad - sin * tl.gather(grad, partner, axis=1)
    tl.store(grad_x_ptr + at, grad * scale[None, :], mask=here)
    tl.store(grad_scales_ptr + slot * channels + c, tl.sum(grad * y, axis=0) / scale)
