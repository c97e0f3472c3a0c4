"""Triton kernels for many tokens of 8 bits: the weight is decoded to 8 bits, in the rotated basis, then multiplied by.

It is rounded again, in units of one scale for each row, so that the tensor cores sum all channels at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from .triton_bytes import ROUNDING, as_float8, by_row, byte_dot, unpack_bytes
from .triton_linear import SIZES, segment, store_rows
from .triton_unpack import load_nibbles, scale_value
from .triton_wide_bytes import tile_place


@triton.jit(do_not_specialize=["first_tile", "last_tile", "k_blocks", "row_tiles"])
def decode_rows_kernel(
    words_ptr,
    grid_ptr,
    row_scales_ptr,  # float32 [NP]
    out_ptr,  # int8 or float8e4nv [rows, 128 KB]: padded rows of the tiles first_tile … last_tile - 1, rotated basis
    first_tile,
    last_tile,
    k_blocks,
    row_tiles,
    BN: tl.constexpr,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    STAGES: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Compute (q - z) · s / row scale, rounded, for one block of 128 channels of some rows."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    kb = tl.program_id(0)
    begin = first_tile * (128 // BN) + tl.program_id(1) * TILES
    end = tl.minimum(begin + TILES, last_tile * (128 // BN))
    channel = tl.arange(0, 128)
    for tile in tl.range(begin, end, num_stages=STAGES):
        n = tile * BN + tl.arange(0, BN)
        fragment = (tile * (BN // 16) + tl.arange(0, BN // 16)) * k_blocks + kb
        words, _ = load_nibbles(
            words_ptr + fragment.to(tl.int64)[None, :, None] * (64 * BITS), True, 1, BN // 16, BITS, True
        )
        grid = tl.load(grid_ptr + (kb * GROUPS + tl.arange(0, GROUPS))[None, :] * (row_tiles * 128) + n[:, None])
        words = tl.reshape(by_row(words, BN), (BN, GROUPS, 4 // GROUPS, 4))
        zeros = ((grid >> 16) & 255)[:, :, None, None]
        number = unpack_bytes(words, zeros, tl.int8, NATIVE).to(tl.float32)
        ratio = scale_value(grid) / tl.load(row_scales_ptr + n)[:, None]
        number = number * ratio[:, :, None, None, None, None, None]
        weight = ((number + ROUNDING) - ROUNDING).to(dtype) if dtype == tl.int8 else as_float8(number, NATIVE)
        weight = tl.reshape(tl.permute(weight, (0, 1, 2, 4, 3, 5, 6)), (BN, 128))
        row = (tile - first_tile * (128 // BN)) * BN + tl.arange(0, BN)
        tl.store(out_ptr + row.to(tl.int64)[:, None] * (k_blocks * 128) + (kb * 128 + channel)[None, :], weight)


@triton.jit(do_not_specialize=[*SIZES, "first_tile", "last_tile"])
def row_bytes_kernel(
    x,  # descriptor of int8 or float8e4nv [T · M, 128 KB], of blocks [BM, 128]
    decoded,  # descriptor of what `decode_rows_kernel` decoded, of blocks [BN, 128]
    x_scales_ptr,  # float32 [T, M]
    row_scales_ptr,  # float32 [NP]
    bias_ptr,
    out_ptr,  # [M, N]
    tokens,
    first_tile,
    last_tile,
    k_blocks,
    octets,
    start1,
    start2,
    size0,
    size1,
    size2,
    BN: tl.constexpr,
    BM: tl.constexpr,
    TOGETHER: tl.constexpr,
    SHARED: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Compute one tile of BN rows, of those in tiles first_tile … last_tile - 1, and BM tokens."""
    kind: tl.constexpr = tl.int32 if x.dtype == tl.int8 else tl.float32
    row_tiles = (last_tile - first_tile) * 128 // BN
    row_tile, token_tile = tile_place(tl.program_id(0), tl.cdiv(tokens, BM), row_tiles, TOGETHER)
    n = first_tile * 128 + row_tile * BN + tl.arange(0, BN)
    index, first, size, column = segment(first_tile * 128 + row_tile * BN, start1, start2, size0, size1, size2)
    x_row = token_tile * BM if SHARED else token_tile * BM + index * tokens
    if DEPENDENT:
        tl_cuda.gdc_wait()
    acc = tl.zeros((BN, BM), kind)
    for kb in tl.range(0, k_blocks, num_stages=STAGES):
        weight = decoded.load([row_tile * BN, kb * 128])
        part = tl.trans(x.load([x_row, kb * 128]))
        if NATIVE:
            acc = tl.dot(weight, part, acc, out_dtype=kind)
        else:
            acc += byte_dot(weight, part, NATIVE).to(kind)
    m = token_tile * BM + tl.arange(0, BM)
    y = acc.to(tl.float32) * tl.load(x_scales_ptr + x_row + tl.arange(0, BM), mask=m < tokens, other=0.0)[None, :]
    y *= tl.load(row_scales_ptr + n)[:, None]
    store_rows(y, out_ptr, bias_ptr, n - first, size, column, m, tokens, octets * 8, HAS_BIAS)
