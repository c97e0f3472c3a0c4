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

from .triton_linear import SIZES
from .triton_unpack import ASSEMBLY

#: What newer versions of Triton call otherwise: wait until all threads of a program have come here; copy a tile by TMA.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _twice(half):
    """Copy a 16-bit pattern into both halves of a word."""
    return half | (half << 16)


@gluon.jit
def _two_weights(word, zero, scale, rest, PAIR: gl.constexpr, dtype: gl.constexpr):
    """Turn nibbles PAIR and PAIR + 4 of each word into two weights (q - z) · s, tensors of the words' shape."""
    code: gl.constexpr = ASSEMBLY[8 * (dtype == gl.bfloat16) + 4 + PAIR]
    if dtype == gl.float16:  # noqa: SIM108
        offset = (zero << 4) | -0x2BFF2C00 if PAIR % 2 else zero | -0x1BFF1C00  # -(64 + z), -(1024 + z), twice
    else:
        offset = zero | -0x3CFF3D00  # -(128 + z), twice
    both = gl.inline_asm_elementwise(code, "=r,r,r,r,r", [word, offset, scale, rest], gl.int32, is_pure=True, pack=1)
    return both.to(gl.int16).to(dtype, bitcast=True), (both >> 16).to(gl.int16).to(dtype, bitcast=True)


@gluon.jit
def _unpack_half(words, grid, dtype: gl.constexpr):
    """Dequantize 64 channels of 128 rows: words [8, rh 2, r 8, t 4, c 2], grid [8, 2, 8, 1, 1 or 2] → [128, 64].

    The channels are in `mma_order`.
    """
    value = (grid.to(gl.int16).to(gl.float16, bitcast=True)).to(gl.float32)
    rounded = value.to(dtype)
    scale = _twice(rounded.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF)
    rest = grid & 0
    if dtype == gl.bfloat16:  # a float16 scale has 11 significant bits, bfloat16 only 8: it is split in two
        rest = _twice((value - rounded.to(gl.float32)).to(dtype).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF)
    zero = _twice((grid >> 16) & 15)
    words, zero = gl.broadcast(words, zero)
    words, scale = gl.broadcast(words, scale)
    words, rest = gl.broadcast(words, rest)
    low0, high0 = _two_weights(words, zero, scale, rest, 0, dtype)
    low1, high1 = _two_weights(words, zero, scale, rest, 1, dtype)
    low2, high2 = _two_weights(words, zero, scale, rest, 2, dtype)
    low3, high3 = _two_weights(words, zero, scale, rest, 3, dtype)
    low = gl.join(gl.join(low0, low2), gl.join(low1, low3))
    high = gl.join(gl.join(high0, high2), gl.join(high1, high3))
    weight = gl.permute(gl.join(low, high), (0, 1, 2, 4, 5, 6, 3, 7))  # R rh r t c h i1 i0 → R rh r, c h i1 t i0
    return gl.reshape(weight, (128, 64))


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
def _codes(words_at, grid_at, block, end, k_blocks, token_tiles, padded_rows, GROUPS: gl.constexpr):
    """Load the words and the grid of a block of 128 channels; of the program's last block where there is none."""
    block = gl.minimum(block, end - 1)
    tile = block // k_blocks
    row_tile = tile // token_tiles
    kb = block - tile * k_blocks
    words = gl.load(words_at + (row_tile * 8 * k_blocks + kb).to(gl.int64) * 256)
    at = grid_at + row_tile * 128 + kb * GROUPS * padded_rows
    if GROUPS == 1:
        low = gl.load(at)
        return words, low, low
    return words, gl.load(at), gl.load(at + GROUPS // 2 * padded_rows)


@gluon.jit
def _halves(words, HALF: gl.constexpr):
    """Split words [8, 2, 8, 4, c 4] into those of c = 0, 1 and of c = 2, 3, in the layout HALF."""
    first, second = gl.split(gl.permute(gl.reshape(words, (8, 2, 8, 4, 2, 2)), (0, 1, 2, 3, 5, 4)))
    first = gl.convert_layout(first, HALF, assert_trivial=True)
    return first, gl.convert_layout(second, HALF, assert_trivial=True)


@gluon.jit
def _row_of(LAYOUT: gl.constexpr):
    """Return the row in its tile of each word: [8, 2, 8, 1, 1]."""
    L3: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, LAYOUT))
    fragment = gl.arange(0, 8, layout=gl.SliceLayout(1, gl.SliceLayout(2, L3)))[:, None][:, :, None]
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, L3)))[None, :][:, :, None]
    r = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, L3)))[None, :][:, None, :]
    return (fragment * 16 + half * 8 + r)[:, :, :, None][:, :, :, :, None]


@gluon.jit
def _last_of(SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """Return 0 … SIZE - 1 along the last of five dimensions."""
    L1: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT)))
    last = gl.arange(0, SIZE, layout=gl.SliceLayout(0, L1))
    return last[None, :][:, None, :][:, :, None, :][:, :, :, None, :]


@gluon.jit
def _word_of(k_blocks, LAYOUT: gl.constexpr):
    """Return the place of each word of a tile's block: [8, rh 2, r 8, t 4, c 4] (see `KernelLayout`)."""
    L4: gl.constexpr = gl.SliceLayout(4, LAYOUT)
    L3: gl.constexpr = gl.SliceLayout(3, L4)
    fragment = gl.arange(0, 8, layout=gl.SliceLayout(1, gl.SliceLayout(2, L3)))[:, None][:, :, None]
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, L3)))[None, :][:, :, None]
    r = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, L3)))[None, :][:, None, :]
    t = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L4))))
    t = t[None, :][:, None, :][:, :, None, :][:, :, :, :, None]
    rows = (fragment * (k_blocks * 256) + half * 128 + r * 16)[:, :, :, None][:, :, :, :, None]
    return rows + t * 4 + _last_of(4, LAYOUT)


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
    words_at = words_ptr + _word_of(k_blocks, WORDS)
    grid_at = grid_ptr + _row_of(HALF)
    if GROUPS == 4:
        grid_at = grid_at + _last_of(2, HALF) * padded_rows
    words1, low1, high1 = _codes(words_at, grid_at, begin, end, k_blocks, token_tiles, padded_rows, GROUPS)
    if DEPENDENT:
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, is_pure=False, pack=1)
    for block in range(begin, end):
        words, low, high = words1, low1, high1
        words1, low1, high1 = _codes(words_at, grid_at, block + 1, end, k_blocks, token_tiles, padded_rows, GROUPS)
        tile = block // k_blocks
        row_tile = tile // token_tiles
        row = (tile - row_tile * token_tiles) * BM
        if not SHARED:
            row += ((row_tile >= start1).to(gl.int32) + (row_tile >= start2).to(gl.int32)) * tokens
        channel = (block - tile * k_blocks) * 128
        first_words, second_words = _halves(words, HALF)
        step = block - begin
        place = step % STAGES
        bar = ready.index(place)
        mbarrier.wait(free.index(place), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, BM * 256)
        copy_tile(x, [row, channel], bar, tokens_in.index(2 * place))
        copy_tile(x, [row, channel + 64], bar, tokens_in.index(2 * place + 1))
        weights_in.index(2 * place).store(_unpack_half(first_words, low, dtype))
        weights_in.index(2 * place + 1).store(_unpack_half(second_words, high, dtype))
        fence_async_shared()
        mbarrier.arrive(bar, count=1)


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
