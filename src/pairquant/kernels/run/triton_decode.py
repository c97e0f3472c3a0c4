"""A Triton kernel that decodes the weight and undoes its rotation. On NVIDIA GPUs this is used for many tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_linear import segment
from .triton_rotate import dot
from .triton_unpack import load_nibbles, scale_value, wide_weight


@triton.jit(
    do_not_specialize=[
        "first_tile",
        "last_tile",
        "k_blocks",
        "row_tiles",
        "runs",
        "start1",
        "start2",
        "size0",
        "size1",
        "size2",
    ]
)
def decode_kernel(
    words_ptr,
    grid_ptr,
    matrix_ptr,  # [T, 128, 128 KB], float32 for a float32 weight, else float16: diag(1/a) R of each block, in `mma_order`
    out_ptr,  # [rows, C]: the rows of tiles first_tile … last_tile - 1, without padding
    first_tile,
    last_tile,
    k_blocks,
    row_tiles,
    runs,  # C / 32
    start1,
    start2,
    size0,
    size1,
    size2,
    BN: tl.constexpr,
    TILES: tl.constexpr,  # tiles of BN rows per program; unless SHARED, all of one linear
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
    BITS: tl.constexpr,
    STAGES: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Compute Ŵ[n, c] = s[n, g(c)] · Σ_k (q - z)[n, k] · (diag(1/a) R)[c, k] for one block of 128 channels.

    R does not mix channels of different groups, so the scale s can be applied after the product. The product then has the
    operand q - z, which 16 bits hold exactly. Blocks of MXFP4 are smaller than groups may be, and float16 holds their values
    exactly: there the scale is applied before.
    """
    FLOATS: tl.constexpr = grid_ptr.dtype.element_ty == tl.float32
    dtype: tl.constexpr = matrix_ptr.dtype.element_ty
    channels = runs * 32
    kb = tl.program_id(0)
    begin = first_tile * (128 // BN) + tl.program_id(1) * TILES
    end = tl.minimum(begin + TILES, last_tile * (128 // BN))
    index, _, _, _ = segment(begin * BN, start1, start2, size0, size1, size2)
    k = tl.arange(0, 128)
    c = kb * 128 + k
    matrix_at = matrix_ptr + k[None, :] * (k_blocks * 128) + (kb * 128 + k)[:, None]  # [k, c]
    if not SHARED:
        matrix_at += index * 128 * (k_blocks * 128)
    matrix = tl.load(matrix_at)
    _, first, _, column = segment(first_tile * 128, start1, start2, size0, size1, size2)
    out_row = column + first_tile * 128 - first  # the row of the weight at which `out` begins, not counting padding
    for tile in tl.range(begin, end, num_stages=STAGES):
        n = tile * BN + tl.arange(0, BN)
        fragment = (tile * (BN // 16) + tl.arange(0, BN // 16)) * k_blocks + kb
        words_at = words_ptr + fragment.to(tl.int64)[None, :, None] * (64 * BITS)
        words, high = load_nibbles(words_at, True, 1, BN // 16, BITS, True)
        grid = tl.load(grid_ptr + (kb * GROUPS + tl.arange(0, GROUPS))[None, :] * (row_tiles * 128) + n[:, None])
        weight = wide_weight(words, high, grid, FLOATS, BN, GROUPS, BITS, tl.float16, NATIVE)
        if dtype == tl.float32:
            y = tl.dot(weight.to(tl.float32), matrix, input_precision="ieee")
        else:
            y = dot(weight, matrix, NATIVE)
        if not FLOATS:
            y = tl.reshape(tl.reshape(y, (BN, GROUPS, 128 // GROUPS)) * scale_value(grid)[:, :, None], (BN, 128))
        _, first, size, column = segment(tile * BN, start1, start2, size0, size1, size2)
        row = n - first
        at = (column - out_row + row).to(tl.int64)[:, None] * channels + c[None, :]
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=(row < size)[:, None] & (c < channels)[None, :])
