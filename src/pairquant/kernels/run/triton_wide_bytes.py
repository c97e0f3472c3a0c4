"""Triton kernels that multiply activations of 8 bits by packed weights on the 8-bit tensor cores.

Both are exact in the weights: the tensor cores sum each group, and its sum is multiplied by the scale in float32.

wide_bytes_kernel    some tokens: Stream-K
whole_bytes_kernel   more: one tile for each program, two accumulators for which a weight is unpacked once
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as tl_cuda
from triton.tools.tensor_descriptor import TensorDescriptor

from .triton_bytes import block_product
from .triton_linear import SIZES, segment, store_rows
from .triton_unpack import load_nibbles


def described(codes: Tensor, block: list[int]) -> TensorDescriptor:
    """Describe codes, 8-bit [rows, channels], for loads of blocks of this shape. What a block has beyond the end is zero."""
    return TensorDescriptor.from_tensor(codes, block)


@triton.jit
def tile_place(tile, token_tiles, row_tiles, TOGETHER: tl.constexpr):
    """Return the row tile and the token tile of a tile: bands of TOGETHER token tiles, in each all rows one after the other.

    So what runs at the same time reads few different activations and weights, and finds them in the L2 cache.
    """
    band = tile // (TOGETHER * row_tiles)
    height = tl.minimum(token_tiles - band * TOGETHER, TOGETHER)
    inside = tile - band * TOGETHER * row_tiles
    return inside // height, band * TOGETHER + inside % height


@triton.jit(do_not_specialize=SIZES)
def wide_bytes_kernel(
    x,  # descriptor of int8 or float8e4nv [T · M, 128 KB], of blocks [BM, 128 / S]: rotated, channels in their usual order
    x_scales_ptr,  # float32 [T, M]
    words_ptr,  # int32 [NP / 16, KB, 64 BITS] (layout.KernelLayout)
    grid_ptr,  # int32 [KB · S, NP]
    bias_ptr,  # out's dtype [N]
    out_ptr,  # [M, N]
    partial_ptr,  # float32 [programs, 2, BN, BM]
    arrivals_ptr,  # int32 [programs], all zero before and after the launch
    tokens,
    k_blocks,
    row_tiles,  # NP / 128
    octets,  # N / 8
    start1,  # first rows of the second and third linear, in tiles of 128
    start2,
    size0,  # out_features of each, divided by 8
    size1,
    size2,
    BN: tl.constexpr,
    BM: tl.constexpr,
    TOGETHER: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,  # all linears have the same transform and read the first M rows of x
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Compute the product by Stream-K, as `triton_linear.wide_kernel` does."""
    padded_rows = row_tiles * 128
    token_tiles = tl.cdiv(tokens, BM)
    total = (padded_rows // BN) * token_tiles * k_blocks
    program = tl.program_id(0)
    run = tl.cdiv(total, tl.num_programs(0))
    begin = program * run
    end = tl.minimum(begin + run, total)
    if DEPENDENT:
        tl_cuda.gdc_wait()
    in_tile = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    while begin < end:
        tile = begin // k_blocks
        start = begin - tile * k_blocks
        stop = tl.minimum(k_blocks, start + end - begin)
        row_tile, token_tile = tile_place(tile, token_tiles, padded_rows // BN, TOGETHER)
        n = row_tile * BN + tl.arange(0, BN)
        index, first, size, column = segment(row_tile * BN, start1, start2, size0, size1, size2)
        fragment = (row_tile * (BN // 16) + tl.arange(0, BN // 16)) * k_blocks
        words_at = words_ptr + fragment.to(tl.int64)[None, :, None] * (64 * BITS)
        x_row = token_tile * BM if SHARED else token_tile * BM + index * tokens
        acc = tl.zeros((BN, BM), tl.float32)
        for kb in tl.range(start, stop, num_stages=STAGES):
            words, _ = load_nibbles(words_at + kb * (64 * BITS), True, 1, BN // 16, BITS, True)
            grid_at = grid_ptr + kb * GROUPS * padded_rows + n
            acc, _ = block_product(
                acc, acc, words, grid_at, padded_rows, x, x_row, kb * 128, BN, BM, False, GROUPS, NATIVE
            )
        whole = stop - start == k_blocks
        if not whole:
            slot = 2 * program + (start == 0).to(tl.int32)  # a program can begin within one tile and end within another
            slot_at = partial_ptr + slot.to(tl.int64) * (BN * BM) + in_tile
            tl.store(slot_at, acc)
            tl.debug_barrier()
            first_program = (tile * k_blocks) // run
            last_program = (tile * k_blocks + k_blocks - 1) // run
            # at most one of the tiles that begin in a program's run goes on in the next one
            arrived = tl.atomic_add(arrivals_ptr + first_program, 1, sem="acq_rel")
            if arrived == last_program - first_program:
                acc = tl.zeros((BN, BM), tl.float32)
                for part in range(first_program, last_program + 1):
                    slot = 2 * part + (part == first_program).to(tl.int32)
                    slot_at = partial_ptr + slot.to(tl.int64) * (BN * BM) + in_tile
                    acc += tl.load(slot_at, cache_modifier=".cg")
                tl.store(arrivals_ptr + first_program, 0)
                whole = True
        if whole:
            m = token_tile * BM + tl.arange(0, BM)
            scales_at = x_scales_ptr + x_row + tl.arange(0, BM)
            acc *= tl.load(scales_at, mask=m < tokens, other=0.0)[None, :]
            store_rows(acc, out_ptr, bias_ptr, n - first, size, column, m, tokens, octets * 8, HAS_BIAS)
        begin += stop - start


@triton.jit(do_not_specialize=SIZES)
def whole_bytes_kernel(
    x,  # descriptor of int8 or float8e4nv [T · M, 128 KB], of blocks [HALF, 128 / S]
    x_scales_ptr,  # float32 [T, M]
    words_ptr,
    grid_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    k_blocks,
    row_tiles,
    octets,
    start1,
    start2,
    size0,
    size1,
    size2,
    BN: tl.constexpr,
    HALF: tl.constexpr,  # tokens of an accumulator
    TOGETHER: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Compute one tile of BN rows and 2 HALF tokens."""
    padded_rows = row_tiles * 128
    row_tile, token_tile = tile_place(tl.program_id(0), tl.cdiv(tokens, 2 * HALF), padded_rows // BN, TOGETHER)
    n = row_tile * BN + tl.arange(0, BN)
    index, first, size, column = segment(row_tile * BN, start1, start2, size0, size1, size2)
    x_row = token_tile * (2 * HALF) if SHARED else token_tile * (2 * HALF) + index * tokens
    fragment = (row_tile * (BN // 16) + tl.arange(0, BN // 16)) * k_blocks
    words_at = words_ptr + fragment.to(tl.int64)[None, :, None] * (64 * BITS)
    if DEPENDENT:
        tl_cuda.gdc_wait()
    acc = tl.zeros((BN, HALF), tl.float32)
    other = tl.zeros((BN, HALF), tl.float32)
    for kb in tl.range(0, k_blocks, num_stages=STAGES):
        words, _ = load_nibbles(words_at + kb * (64 * BITS), True, 1, BN // 16, BITS, True)
        grid_at = grid_ptr + kb * GROUPS * padded_rows + n
        acc, other = block_product(
            acc, other, words, grid_at, padded_rows, x, x_row, kb * 128, BN, HALF, True, GROUPS, NATIVE
        )
    m = token_tile * (2 * HALF) + tl.arange(0, HALF)
    scales_at = x_scales_ptr + x_row + tl.arange(0, HALF)
    acc *= tl.load(scales_at, mask=m < tokens, other=0.0)[None, :]
    store_rows(acc, out_ptr, bias_ptr, n - first, size, column, m, tokens, octets * 8, HAS_BIAS)
    other *= tl.load(scales_at + HALF, mask=m + HALF < tokens, other=0.0)[None, :]
    store_rows(other, out_ptr, bias_ptr, n - first, size, column, m + HALF, tokens, octets * 8, HAS_BIAS)
