"""Triton kernels that scale and rotate activations: y = (x · diag(1/a)) R (docs/method.md, "Transform").

For a channel c of a group, with partner p(c) and the signed sine s_c of its pair, one rotation is

    y_c = cos_c · x_c + s_c · x_p(c)

For few tokens, one warp keeps a tile (128 channels of a few tokens) in registers through all K rotations, and fetches
partners by warp shuffles. For many tokens the shuffles would take longer than reading the activations. Then R, which is
computed once by rotating the identity, is multiplied with them on the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda


@triton.jit
def dot(a, b, NATIVE: tl.constexpr):
    """Compute a · b in float32. The interpreter cannot multiply bfloat16, so there the operands are converted to float32."""
    if NATIVE:
        return tl.dot(a, b)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")


@triton.jit
def load_input(x_ptr, row, c, here, channels, ACTIVATION: tl.constexpr):
    """Load x[row, c], float32. With an activation, x has 2 C columns, of gate and up, and the input is act(gate) · up.

    row: where the rows start; c: channels; here: which elements exist, the others are zero.
    """
    x = tl.load(x_ptr + row + c, mask=here, other=0.0).to(tl.float32)
    if ACTIVATION != "":
        up = tl.load(x_ptr + row + channels + c, mask=here, other=0.0).to(tl.float32)
        if ACTIVATION == "silu":
            x = x * tl.sigmoid(x)
        elif ACTIVATION == "gelu_tanh":
            x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 2 sqrt(2 / pi)
        else:
            tl.static_assert(ACTIVATION == "gelu")
            x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        x = x * up
    return x


@triton.jit
def mma_order(c):
    """Return the place at which `triton_linear.wide_kernel` expects channel c (see `layout.KernelLayout`)."""
    return (c & ~15) + ((c >> 1) & 1) * 8 + ((c >> 2) & 3) * 2 + (c & 1)


@triton.jit
def load_steps(steps_ptr, partners_ptr, K: tl.constexpr):
    """Load K rotations of one block of `RotationWeights`' tensors, at which the pointers are: (cosines, sines, partners) of each.

    All are loaded before the first is needed. One at a time, each would be waited for.
    """
    c = tl.arange(0, 128)
    steps = ()
    for k in tl.static_range(K):
        cos = tl.load(steps_ptr + k * 256 + c)
        sin = tl.load(steps_ptr + k * 256 + 128 + c)
        partners = tl.load(partners_ptr + k * 128 + c)
        steps = steps + ((cos, sin, partners),)  # type: ignore[assignment]  # noqa: RUF005  Triton cannot unpack into a tuple
    return steps


@triton.jit
def rotate_block(x, steps, TOKENS: tl.constexpr):
    """Apply the rotations of `load_steps` to x, float32 [TOKENS, 128]."""
    for k in tl.static_range(len(steps)):
        cos, sin, partners = steps[k]
        partner = tl.broadcast_to(partners[None, :], (TOKENS, 128))
        x = cos[None, :] * x + sin[None, :] * tl.gather(x, partner, axis=1)
    return x


@triton.jit
def relative(x, peaks_at, here):
    """Divide the rows of x, float32 [TOKENS, 128], by their largest magnitudes, and store these at `peaks_at` [TOKENS].

    So 16 bits hold what is to be rounded to 8 once the largest of the whole row is known, whatever its range. Rows of
    zeros stay zero; below 1e-30, whose inverse float32 may not hold, numbers are taken for zeros.
    """
    peak = tl.max(tl.abs(x), 1)
    tl.store(peaks_at, peak, mask=here)
    return x * (1.0 / tl.where(peak > 1e-30, peak, float("inf")))[:, None]


@triton.jit(do_not_specialize=["tokens", "runs", "blocks"])
def givens_kernel(
    x_ptr,  # [M, C], row stride x_stride, or [M, 2 C] with an activation (`load_input`); not read if IDENTITY
    coefficients_ptr,  # float32 [T, KB, K, 2, 128]: cosines, signed sines
    partners_ptr,  # int32 [T, KB, K, 128], counted from the block's first channel
    scales_ptr,  # [T, C]: 1/a
    out_ptr,  # [T, M, 128 KB] with zeros beyond C if PADDED, else [T, M, C]
    peaks_ptr,  # float32 [T, M, KB], written if PEAKS (`relative`)
    tokens,
    runs,  # C / 32: as C is computed from it, the compiler knows that C is a multiple of 32 without a variant for it
    x_stride,
    blocks,  # KB
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    PADDED: tl.constexpr,
    MMA_ORDER: tl.constexpr,
    IDENTITY: tl.constexpr,  # rotate the 128 × 128 identity in each block instead of x
    ACTIVATION: tl.constexpr,
    PEAKS: tl.constexpr,
    TRIGGER: tl.constexpr,  # whether the next kernel may start before this one has ended
    DEPENDENT: tl.constexpr,
):
    """Scale and rotate one block of 128 channels of TOKENS tokens, one rotation after the other."""
    channels = runs * 32
    width = blocks * 128 if PADDED else channels
    block = tl.program_id(0)
    c = block * 128 + tl.arange(0, 128)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    transform = tl.program_id(2)
    real = c < channels
    scale = tl.load(scales_ptr + transform * channels + c, mask=real, other=0.0).to(tl.float32)
    at = (transform * blocks + block) * K
    steps = load_steps(coefficients_ptr + at * 256, partners_ptr + at * 128, K)
    if DEPENDENT:
        tl_cuda.gdc_wait()
    if TRIGGER:
        tl_cuda.gdc_launch_dependents()
    if IDENTITY:
        x = tl.where(t[:, None] == (c % 128)[None, :], 1.0, 0.0)
    else:
        here = (t < tokens)[:, None] & real[None, :]
        x = load_input(x_ptr, t.to(tl.int64)[:, None] * x_stride, c[None, :], here, channels, ACTIVATION)
    x = rotate_block(x * scale[None, :], steps, TOKENS)
    if PEAKS:
        x = relative(x, peaks_ptr + (transform * tokens + t) * blocks + block, t < tokens)
    column = mma_order(c) if MMA_ORDER else c
    row = (transform * tokens + t).to(tl.int64)[:, None] * width
    inside = (t < tokens)[:, None] & (c < width)[None, :]
    tl.store(out_ptr + row + column[None, :], x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "runs", "blocks", "tiles"])
def dense_rotate_kernel(
    x_ptr,  # [M, C], row stride x_stride, or [M, 2 C] with an activation (`load_input`)
    matrix_ptr,  # float16 [T, 128, 128 KB]: R of each block of channels, scales included
    out_ptr,  # [T, M, 128 KB], zeros beyond C; in `mma_order`, or in the usual order if PEAKS
    peaks_ptr,  # float32 [T, M, KB], written if PEAKS (`relative`)
    tokens,
    runs,  # C / 32
    x_stride,
    blocks,  # KB
    tiles,  # of TOKENS tokens per program
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,  # the same where they are few, else 0, so that no number of tokens has a kernel of its own
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PEAKS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Scale and rotate one block of 128 channels of tiles · TOKENS tokens, by one matrix product for each tile."""
    channels = runs * 32
    out_channels = blocks * 128
    transform = tl.program_id(2)
    k = tl.arange(0, 128)
    c = tl.program_id(0) * 128 + k
    matrix = tl.load(matrix_ptr + (transform * 128 + k)[:, None] * out_channels + c[None, :])
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    high = matrix.to(tl.float32).to(dtype)
    low = (matrix.to(tl.float32) - high.to(tl.float32)).to(dtype)  # the part that bfloat16 cannot hold of a float16
    if DEPENDENT:
        tl_cuda.gdc_wait()
        tl_cuda.gdc_launch_dependents()
    first = tl.program_id(1) * tiles
    end = first + (TILES if TILES > 0 else tiles)
    for tile in tl.range(first, end, num_stages=STAGES):
        t = tile * TOKENS + tl.arange(0, TOKENS)
        here = (t < tokens)[:, None] & (c < channels)[None, :]
        x = load_input(x_ptr, t.to(tl.int64)[:, None] * x_stride, c[None, :], here, channels, ACTIVATION).to(dtype)
        y = dot(x, high, NATIVE)
        if dtype == tl.bfloat16:
            y += dot(x, low, NATIVE)
        if PEAKS:
            y = tl.reshape(
                tl.permute(tl.reshape(y, (TOKENS, 8, 2, 4, 2)), (0, 1, 3, 2, 4)), (TOKENS, 128)
            )  # i1 t i0 → t i1 i0
            y = relative(y, peaks_ptr + (transform * tokens + t) * blocks + tl.program_id(0), t < tokens)
        row = (transform * tokens + t).to(tl.int64)[:, None] * out_channels
        tl.store(out_ptr + row + c[None, :], y.to(out_ptr.dtype.element_ty), mask=(t < tokens)[:, None])
