"""Triton kernels that compute y = x_rot · Ŵᵀ with packed weights on NVIDIA GPUs.

Both kernels compute the transpose, Ŵ · x_rotᵀ. They dequantize Ŵ in registers (`triton_unpack`).

narrow_kernel   up to 16 tokens: each warp sums its own part of the channels; warps and programs are added at the end
wide_kernel     up to some hundred tokens: one product of a warp group per 128 channels

For more tokens than that, the weight is decoded first (`triton_decode`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from .triton_norm import inverse_root
from .triton_rotate import dot
from .triton_unpack import load_nibbles, narrow_product, wide_weight


@triton.jit
def segment(row, start1, start2, size0, size1, size2):
    """Find the linear, of up to three merged ones, to which a padded row belongs.

    Returns the linear's index, its first padded row, its out_features, and its first column in the output.
    """
    tile = row // 128
    index = (tile >= start1).to(tl.int32) + (tile >= start2).to(tl.int32)
    first = tl.where(index == 0, 0, tl.where(index == 1, start1, start2))
    size = tl.where(index == 0, size0, tl.where(index == 1, size1, size2))
    column = tl.where(index == 0, 0, tl.where(index == 1, size0, size0 + size1))
    return index, first * 128, size * 8, column * 8


@triton.jit
def prefetch(words_ptr, first, k_blocks, blocks, BN: tl.constexpr, WARPS: tl.constexpr, WORDS: tl.constexpr):
    """Start loading this program's first `blocks` blocks of 128 channels into the L2 cache, each warp an equal part.

    WORDS: that 16 rows of such a block have.
    """
    warp = tl.arange(0, 32 * WARPS) // 32  # a whole warp makes one request, by one instruction
    share = blocks * WORDS // WARPS
    for row in tl.static_range(BN // 16):
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [words_ptr + (first + row * k_blocks).to(tl.int64) * WORDS + warp * share, warp * 0 + share * 4],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


#: Arguments whose values must not lead to new variants of a kernel: a request of a new length would wait for the compiler.
SIZES = ["tokens", "k_blocks", "row_tiles", "octets", "start1", "start2", "size0", "size1", "size2"]


@triton.jit(do_not_specialize=[*SIZES, "ahead"])
def narrow_kernel(
    x_ptr,  # 16-bit [T, M, 128 KB]: rotated, the channels in their usual order
    words_ptr,  # int32 [NP / 16, KB, 64 BITS] (layout.KernelLayout)
    grid_ptr,  # int32 [KB · S, NP]
    bias_ptr,  # x's dtype [N]
    out_ptr,  # [M, N]
    squares_ptr,  # float32 [M, KB], read if NORM: parts of r², by whose root the product is divided (`triton_norm`)
    partial_ptr,  # float32 [SPLIT, M, NP]
    arrivals_ptr,  # int32 [NP / BN], all zero before and after the launch
    tokens,
    k_blocks,
    row_tiles,  # NP / 128
    octets,  # N / 8: as N is computed from it, the compiler knows that N is a multiple of 8 without a variant for it
    start1,  # first rows of the second and third linear, in tiles of 128
    start2,
    size0,  # out_features of each, divided by 8
    size1,
    size2,
    ahead,  # blocks to prefetch
    BN: tl.constexpr,
    BM: tl.constexpr,
    WARPS: tl.constexpr,
    SPLIT: tl.constexpr,  # whether several programs share K
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,  # S, the number of groups in 128 channels
    SHARED: tl.constexpr,  # all linears have the same transform and read x_ptr[0]
    EVEN: tl.constexpr,  # WARPS divides the number of blocks of every program
    ONE: tl.constexpr,  # a single token
    BITS: tl.constexpr,
    NORM: tl.constexpr,  # 0, or the smallest power of two that is not below KB
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Compute the product for BN rows of the weight and up to 16 tokens.

    Each warp sums its own part of the channels. If SPLIT, several programs share the channels, and the last of them to
    finish adds up their sums.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    padded_rows = row_tiles * 128
    columns = octets * 8
    tile = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    part = tl.arange(0, WARPS)
    m = tl.arange(0, BM)
    n = tile * BN + tl.arange(0, BN)
    fragment = (tile * (BN // 16) + tl.arange(0, BN // 16)) * k_blocks
    per_split = tl.cdiv(tl.cdiv(k_blocks, splits), WARPS) * WARPS
    start = split * per_split
    stop = tl.minimum(start + per_split, k_blocks)
    if DEPENDENT:
        if (ahead > 0) & (start < stop):  # while the rotation runs, load what does not depend on it
            first_fragment = tile * (BN // 16) * k_blocks + start
            prefetch(words_ptr, first_fragment, k_blocks, tl.minimum(stop - start, ahead), BN, WARPS, 64 * BITS)
        tl_cuda.gdc_wait()
    index, first, size, column = segment(tile * BN, start1, start2, size0, size1, size2)
    x_start = 0 if SHARED else index * tokens * (k_blocks * 128)
    x_row = x_start + m * (k_blocks * 128)
    real_token = m < tokens
    words_at = words_ptr + fragment.to(tl.int64)[None, :, None] * (64 * BITS)
    channel = tl.arange(0, 128)
    s = tl.arange(0, GROUPS)
    if NORM:  # loaded here, so that they have arrived at the end
        parts = load_squares(squares_ptr, m, tokens, k_blocks, NORM)
    acc = tl.zeros((WARPS, BN, BM), tl.float32)
    for block in tl.range(start, stop, WARPS, num_stages=STAGES):
        kb = block + part
        here = real_token[None, None, :]
        real = kb < stop
        block_at = words_at + kb[:, None, None] * (64 * BITS)
        words, high = load_nibbles(block_at, real[:, None, None], WARPS, BN // 16, BITS, EVEN)
        if EVEN:
            grid = tl.load(grid_ptr + (kb[:, None] * GROUPS + s[None, :])[:, None, :] * padded_rows + n[None, :, None])
        else:
            here = here & real[:, None, None]
            grid = tl.load(
                grid_ptr + (kb[:, None] * GROUPS + s[None, :])[:, None, :] * padded_rows + n[None, :, None],
                mask=real[:, None, None],
                other=0,
            )
        if ONE:  # copy the token into every column: this takes registers, but columns of zeros would take shared memory
            x = tl.load(x_ptr + x_start + kb[:, None] * 128 + channel[None, :], mask=(kb < stop)[:, None], other=0.0)
            x = tl.broadcast_to(x[:, :, None], (WARPS, 128, BM))
        else:
            x_at = x_ptr + x_row[None, None, :] + kb[:, None, None] * 128 + channel[None, :, None]
            x = tl.load(x_at, mask=here, other=0.0)
        acc += narrow_product(words, high, grid, x, WARPS, BN, GROUPS, BITS, dtype, NATIVE)
    if DEPENDENT:
        tl_cuda.gdc_launch_dependents()
    y = tl.sum(acc, 0)
    if SPLIT:
        partial_at = m[None, :] * padded_rows + n[:, None]
        tl.store(partial_ptr + split * tokens * padded_rows + partial_at, y, mask=real_token[None, :])
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel")
        if arrived < splits - 1:
            return
        y = tl.zeros((BN, BM), tl.float32)
        for other in range(splits):  # always in this order, so that the sum does not depend on who was last
            y += tl.load(
                partial_ptr + other * tokens * padded_rows + partial_at,
                mask=real_token[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
        tl.store(arrivals_ptr + tile, 0)
    if NORM:
        y *= inverse_root(parts)[None, :]
    store_rows(y, out_ptr, bias_ptr, n - first, size, column, m, tokens, columns, HAS_BIAS)


@triton.jit(do_not_specialize=SIZES)
def wide_kernel(
    x_ptr,  # 16-bit [T, M, 128 KB]: rotated, in `mma_order`
    words_ptr,
    grid_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,  # float32 [programs, 2, BN, BM]
    arrivals_ptr,  # int32 [programs], all zero before and after the launch
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
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Compute the product by Stream-K (Osama et al. 2023).

    The blocks of all tiles form one sequence, which is cut into equal runs, one for each program. If several programs
    compute parts of one tile, the last of them to finish adds up the parts, in the order of the programs.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    padded_rows = row_tiles * 128
    columns = octets * 8
    token_tiles = tl.cdiv(tokens, BM)
    total = (padded_rows // BN) * token_tiles * k_blocks
    program = tl.program_id(0)
    run = tl.cdiv(total, tl.num_programs(0))
    begin = program * run
    end = tl.minimum(begin + run, total)
    if DEPENDENT:
        tl_cuda.gdc_wait()
    s = tl.arange(0, GROUPS)
    in_tile = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    while begin < end:
        tile = begin // k_blocks
        start = begin - tile * k_blocks
        stop = tl.minimum(k_blocks, start + end - begin)
        row_tile = tile // token_tiles
        m = (tile - row_tile * token_tiles) * BM + tl.arange(0, BM)
        n = row_tile * BN + tl.arange(0, BN)
        index, first, size, column = segment(row_tile * BN, start1, start2, size0, size1, size2)
        fragment = (row_tile * (BN // 16) + tl.arange(0, BN // 16)) * k_blocks
        words_at = words_ptr + fragment.to(tl.int64)[None, :, None] * (64 * BITS)
        x_row = m * (k_blocks * 128)
        if not SHARED:
            x_row += index * tokens * (k_blocks * 128)
        x_at = x_ptr + x_row[None, :] + tl.arange(0, 128)[:, None]
        real_token = m < tokens
        acc = tl.zeros((BN, BM), tl.float32)
        for kb in tl.range(start, stop, num_stages=STAGES):
            words, high = load_nibbles(words_at + kb * (64 * BITS), True, 1, BN // 16, BITS, True)
            grid = tl.load(grid_ptr + (kb * GROUPS + s)[None, :] * padded_rows + n[:, None])
            x = tl.load(x_at + kb * 128, mask=real_token[None, :], other=0.0)
            weight = wide_weight(words, high, grid, True, BN, GROUPS, BITS, dtype, NATIVE)
            acc = tl.dot(weight, x, acc) if NATIVE else acc + dot(weight, x, NATIVE)
        whole = stop - start == k_blocks
        if not whole:
            slot = 2 * program + (start == 0).to(tl.int32)  # a program can begin within one tile and end within another
            tl.store(partial_ptr + slot.to(tl.int64) * (BN * BM) + in_tile, acc)
            tl.debug_barrier()
            first_program = (tile * k_blocks) // run
            last_program = (tile * k_blocks + k_blocks - 1) // run
            # at most one of the tiles that begin in a program's run goes on in the next one
            arrived = tl.atomic_add(arrivals_ptr + first_program, 1, sem="acq_rel")
            if arrived == last_program - first_program:
                acc = tl.zeros((BN, BM), tl.float32)
                for other in range(first_program, last_program + 1):
                    slot = 2 * other + (other == first_program).to(tl.int32)
                    at = partial_ptr + slot.to(tl.int64) * (BN * BM) + in_tile
                    acc += tl.load(at, cache_modifier=".cg")
                tl.store(arrivals_ptr + first_program, 0)
                whole = True
        if whole:
            store_rows(acc, out_ptr, bias_ptr, n - first, size, column, m, tokens, columns, HAS_BIAS)
        begin += stop - start


@triton.jit
def load_squares(squares_ptr, m, tokens, k_blocks, NORM: tl.constexpr):
    """Load the parts of r² of tokens m, float32 [BM, NORM]; of tokens that do not exist, those of the last."""
    b = tl.arange(0, NORM)
    at = squares_ptr + tl.minimum(m, tokens - 1)[:, None] * k_blocks + b[None, :]
    return tl.load(at, mask=(b < k_blocks)[None, :], other=0.0)


@triton.jit
def store_rows(y, out_ptr, bias_ptr, row, size, column, m, tokens, columns, HAS_BIAS: tl.constexpr):
    """Add the bias to y [BN, BM] and store it in columns `column + row` of out [M, N]."""
    real = row < size
    if HAS_BIAS:
        y += tl.load(bias_ptr + column + row, mask=real, other=0.0).to(tl.float32)[:, None]
    at = m.to(tl.int64)[None, :] * columns + (column + row)[:, None]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=real[:, None] & (m < tokens)[None, :])
