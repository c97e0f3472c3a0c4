"""A kernel in Gluon for Hopper GPUs that computes y = x_rot · Ŵᵀ while the next weights are unpacked.

Triton waits for a product before it unpacks the weights of the next. Here some warps unpack weights into shared memory and start
the copies of the tokens, while eight others do nothing but multiply. What is computed, and in which layouts, is that of
`triton_linear.wide_kernel`. Gluon has no interpreter: this kernel is tested on GPUs, and compiled everywhere.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_unpack import halves, last_of, load_codes, row_of, unpack_half, word_of
from .triton_linear import SIZES

#: What newer versions of Triton call otherwise: wait until all threads of a program have come here; copy a tile by TMA.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _prepare(
    x,
    tokens_in,
    weights_in,
    ready,
    free,
    words_ptr,
    grid_ptr,
    begin,
    end,
    k_blocks,
    token_tiles,
    tokens,
    row_tiles,
    start1,
    start2,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    SHARED: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """Bring tokens and weights of one block of 128 channels after the other into shared memory, each when its place is free."""
    dtype: gl.constexpr = x.dtype
    # Fragments by warps, r and t by lanes, so that a warp's loads and stores are without gaps.
    WARPS: gl.constexpr = gl.num_warps()
    WORDS: gl.constexpr = gl.BlockedLayout(
        [8 // WARPS, 2, 1, 1, 4], [1, 1, 8, 4, 1], [WARPS, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    HALF: gl.constexpr = gl.BlockedLayout(
        [8 // WARPS, 2, 1, 1, 2], [1, 1, 8, 4, 1], [WARPS, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    padded_rows = row_tiles * 128
    words_at = words_ptr + word_of(k_blocks, WORDS)
    grid_at = grid_ptr + row_of(HALF)
    if GROUPS == 4:
        grid_at = grid_at + last_of(2, HALF) * padded_rows
    words1, low1, high1 = load_codes(words_at, grid_at, begin, end, k_blocks, token_tiles, padded_rows, GROUPS)
    if DEPENDENT:
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, is_pure=False, pack=1)
    for block in range(begin, end):
        words, low, high = words1, low1, high1
        words1, low1, high1 = load_codes(words_at, grid_at, block + 1, end, k_blocks, token_tiles, padded_rows, GROUPS)
        tile = block // k_blocks
        row_tile = tile // token_tiles
        row = (tile - row_tile * token_tiles) * BM
        if not SHARED:
            row += ((row_tile >= start1).to(gl.int32) + (row_tile >= start2).to(gl.int32)) * tokens
        channel = (block - tile * k_blocks) * 128
        first_words, second_words = halves(words, HALF)
        step = block - begin
        place = step % STAGES
        bar = ready.index(place)
        mbarrier.wait(free.index(place), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, BM * 256)
        copy_tile(x, [row, channel], bar, tokens_in.index(2 * place))
        copy_tile(x, [row, channel + 64], bar, tokens_in.index(2 * place + 1))
        weights_in.index(2 * place).store(unpack_half(first_words, low, dtype))
        weights_in.index(2 * place + 1).store(unpack_half(second_words, high, dtype))
        fence_async_shared()
        mbarrier.arrive(bar, count=1)


@gluon.jit
def _segment(row, start1, start2, size0, size1, size2):
    """Do as `triton_linear.segment`, without the index."""
    tile = row // 128
    index = (tile >= start1).to(gl.int32) + (tile >= start2).to(gl.int32)
    first = gl.where(index == 0, 0, gl.where(index == 1, start1, start2))
    size = gl.where(index == 0, size0, gl.where(index == 1, size1, size2))
    column = gl.where(index == 0, 0, gl.where(index == 1, size0, size0 + size1))
    return first * 128, size * 8, column * 8


@gluon.jit
def _multiply(
    tokens_in,
    weights_in,
    ready,
    free,
    bias_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    begin,
    end,
    run,
    k_blocks,
    token_tiles,
    tokens,
    octets,
    start1,
    start2,
    size0,
    size1,
    size2,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """Multiply what `_prepare` brings, and store."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BM, 16])
    program = gl.program_id(0)
    if DEPENDENT:  # before anything is written that the kernel before may still read
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, is_pure=False, pack=1)
    at = begin
    while at < end:
        tile = at // k_blocks
        start = at - tile * k_blocks
        blocks = gl.minimum(k_blocks - start, end - at)
        row_tile = tile // token_tiles
        token = (tile - row_tile * token_tiles) * BM
        first = at - begin
        acc = gl.zeros((128, BM), gl.float32, layout=ACC)
        for step in range(first, first + blocks):
            place = step % STAGES
            mbarrier.wait(ready.index(place), (step // STAGES) & 1)
            tokens0 = tokens_in.index(2 * place).permute((1, 0))
            tokens1 = tokens_in.index(2 * place + 1).permute((1, 0))
            acc = warpgroup_mma(weights_in.index(2 * place), tokens0, acc, is_async=True)
            acc = warpgroup_mma(weights_in.index(2 * place + 1), tokens1, acc, is_async=True)
            acc = warpgroup_mma_wait(2, deps=(acc,))
            if step > first:  # the products of the step before are complete
                mbarrier.arrive(free.index((step - 1) % STAGES), count=1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index((first + blocks - 1) % STAGES), count=1)
        first_row, size, column = _segment(row_tile * 128, start1, start2, size0, size1, size2)
        whole = blocks == k_blocks
        if not whole:
            in_tile = gl.arange(0, 128, layout=gl.SliceLayout(1, ACC))[:, None] * BM
            partial_at = partial_ptr + (in_tile + gl.arange(0, BM, layout=gl.SliceLayout(0, ACC))[None, :])
            slot = 2 * program + (start == 0).to(gl.int32)
            gl.store(partial_at + slot.to(gl.int64) * (128 * BM), acc)
            barrier()
            first_program = (tile * k_blocks) // run
            last_program = (tile * k_blocks + k_blocks - 1) // run
            arrived = gl.atomic_add(arrivals_ptr + first_program, 1, sem="acq_rel")
            if arrived == last_program - first_program:
                acc = gl.zeros((128, BM), gl.float32, layout=ACC)
                for other in range(first_program, last_program + 1):
                    slot = 2 * other + (other == first_program).to(gl.int32)
                    acc += gl.load(partial_at + slot.to(gl.int64) * (128 * BM), cache_modifier=".cg")
                gl.store(arrivals_ptr + first_program, 0)
                whole = True
        if whole:
            row = row_tile * 128 - first_row
            _store(acc, out_ptr, bias_ptr, row, size, column, token, tokens, octets * 8, BM, ACC, HAS_BIAS)
        at += blocks


@gluon.jit
def _store(
    y,
    out_ptr,
    bias_ptr,
    row,
    size,
    column,
    token,
    tokens,
    columns,
    BM: gl.constexpr,
    ACC: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """Add the bias to y [128, BM] and store it, 64 tokens at a time, as each piece goes through shared memory."""
    if HAS_BIAS:
        n = row + gl.arange(0, 128, layout=gl.SliceLayout(1, ACC))
        y += gl.load(bias_ptr + column + n, mask=n < size, other=0.0).to(gl.float32)[:, None]
    y = y.to(out_ptr.dtype.element_ty)
    if BM == 256:
        left, right = gl.split(gl.permute(gl.reshape(y, (128, 2, 128)), (0, 2, 1)))
        _store_128(left, out_ptr, row, size, column, token, tokens, columns)
        _store_128(right, out_ptr, row, size, column, token + 128, tokens, columns)
    else:
        _store_128(y, out_ptr, row, size, column, token, tokens, columns)


@gluon.jit
def _store_128(y, out_ptr, row, size, column, token, tokens, columns):
    left, right = gl.split(gl.permute(gl.reshape(y, (128, 2, 64)), (0, 2, 1)))
    _store_64(left, out_ptr, row, size, column, token, tokens, columns)
    _store_64(right, out_ptr, row, size, column, token + 64, tokens, columns)


@gluon.jit
def _store_64(y, out_ptr, row, size, column, token, tokens, columns):
    ROWS: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, 8], [0, 1])
    y = gl.convert_layout(y, ROWS)
    n = row + gl.arange(0, 128, layout=gl.SliceLayout(1, ROWS))
    m = token + gl.arange(0, 64, layout=gl.SliceLayout(0, ROWS))
    at = m.to(gl.int64)[None, :] * columns + (column + n)[:, None]
    gl.store(out_ptr + at, y, mask=(n < size)[:, None] & (m < tokens)[None, :])


@gluon.jit(do_not_specialize=SIZES)
def overlapped_kernel(
    x,  # descriptor of 16-bit [T · M, 128 KB], rotated, in `mma_order`, of blocks [BM, 64]
    words_ptr,
    grid_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,  # float32 [programs, 2, 128, BM]
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
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    SHARED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """Compute the product by Stream-K, as `wide_kernel` does, in tiles of 128 rows; codes of 4 bits; four or eight warps, and eight more."""
    token_tiles = gl.cdiv(tokens, BM)
    total = row_tiles * token_tiles * k_blocks
    run = gl.cdiv(total, gl.num_programs(0))
    begin = gl.program_id(0) * run
    end = gl.minimum(begin + run, total)
    tokens_in = gl.allocate_shared_memory(x.dtype, [2 * STAGES, BM, 64], x.layout)
    weights_in = gl.allocate_shared_memory(x.dtype, [2 * STAGES, 128, 64], gl.NVMMASharedLayout(128, 16, 2))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=2)  # the copy of the tokens, and the weights
        mbarrier.init(free.index(stage), count=1)
    if begin < end:
        gl.warp_specialize(
            [
                (
                    _prepare,
                    (
                        x,
                        tokens_in,
                        weights_in,
                        ready,
                        free,
                        words_ptr,
                        grid_ptr,
                        begin,
                        end,
                        k_blocks,
                        token_tiles,
                        tokens,
                        row_tiles,
                        start1,
                        start2,
                        BM,
                        STAGES,
                        GROUPS,
                        SHARED,
                        DEPENDENT,
                    ),
                ),
                (
                    _multiply,
                    (
                        tokens_in,
                        weights_in,
                        ready,
                        free,
                        bias_ptr,
                        out_ptr,
                        partial_ptr,
                        arrivals_ptr,
                        begin,
                        end,
                        run,
                        k_blocks,
                        token_tiles,
                        tokens,
                        octets,
                        start1,
                        start2,
                        size0,
                        size1,
                        size2,
                        BM,
                        STAGES,
                        HAS_BIAS,
                        DEPENDENT,
                    ),
                ),
            ],
            [8],
            [168],
        )
