"""Triton kernels that compute y = x_rot · Ŵᵀ with packed 4-bit weights on NVIDIA GPUs.

Both kernels compute the transpose, Ŵ · x_rotᵀ. They dequantize Ŵ in registers, directly into the operand layout of the
tensor cores (see layout.KernelLayout).

narrow_kernel   up to 16 tokens: each warp sums its own part of the channels; warps and programs are added at the end
wide_kernel     up to some hundred tokens: one product of a warp group per 128 channels

For more tokens than that, the weight is decoded first (`triton_decode`).

Half of the time for a weight is unpacking. The assembly below needs 0.6 integer instructions per weight. The compiler's code
would need about 3, and that would take longer than reading the weights: for one block of an 8B model, an H100 needs 15 us
for each instruction per weight, and 46 us to read the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from .triton_rotate import dot


def _pair_assembly(pair: int, dtype: str, scaled: int) -> str:
    """Return assembly that turns nibbles `pair` and `pair + 4` of word $1 into two 16-bit floats q - z.

    If `scaled`, it also multiplies them by the scale $3 (for bfloat16, $3 + $4). A nibble that is OR-ed into the mantissa of
    1024 (float16) or 128 (bfloat16) makes the float 1024 + q or 128 + q; adding -(1024 + z) or -(128 + z) gives exactly
    q - z. $2 holds the number to add. In float16 the nibble may also be 4 bits higher in the mantissa, which makes
    1024 + 16 q; one multiply-add with 1/16 and -(64 + z) turns that into q - z. This saves half of the shifts.
    """
    source, lines = "$1", [".reg .b32 a, one;"]
    if dtype == "fp16":
        if pair >= 2:
            lines.append("shr.u32 a, $1, 8;")
            source = "a"
        low = pair % 2 == 0
        lines.append(f"lop3.b32 a, {source}, {0x000F000F if low else 0x00F000F0}, 0x64006400, 0xea;")
        lines.append("add.f16x2 a, a, $2;" if low else "mov.b32 one, 0x2c002c00; fma.rn.f16x2 a, a, one, $2;")
        lines.append("mul.f16x2 $0, a, $3;" if scaled else "mov.b32 $0, a;")
    else:
        if pair:
            lines.append(f"shr.u32 a, $1, {4 * pair};")
            source = "a"
        lines.append(f"lop3.b32 a, {source}, 0x000f000f, 0x43004300, 0xea;")
        lines.append("mov.b32 one, 0x3f803f80; fma.rn.bf16x2 a, a, one, $2;")
        if scaled:  # a · s with one rounding: the scale is $3 + $4, and the product with $4 is small
            lines.append("mov.b32 one, 0x80008000; fma.rn.bf16x2 one, a, $4, one; fma.rn.bf16x2 $0, a, $3, one;")
        else:
            lines.append("mov.b32 $0, a;")
    return "{" + " ".join(lines) + "}"


#: The assembly at index 8 · (1 for bfloat16) + 4 · scaled + pair.
ASSEMBLY = tl.constexpr(
    tuple(_pair_assembly(pair, dtype, scaled) for dtype in ("fp16", "bf16") for scaled in (0, 1) for pair in range(4))
)


@triton.jit
def _twice(half):
    """Copy a 16-bit pattern into both halves of a word."""
    return half | (half << 16)


@triton.jit
def _low_half(pair, dtype: tl.constexpr):
    return pair.to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _high_half(pair, dtype: tl.constexpr):
    return (pair >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _two_weights(
    word, zero, scale, rest, PAIR: tl.constexpr, SCALED: tl.constexpr, dtype: tl.constexpr, NATIVE: tl.constexpr
):
    """Turn nibbles PAIR and PAIR + 4 of each word into q - z, or (q - z) · s if SCALED: two tensors of the word's shape."""
    word, zero = tl.broadcast(word, zero)
    word, scale = tl.broadcast(word, scale)
    word, rest = tl.broadcast(word, rest)
    if NATIVE:
        if dtype == tl.float16:
            offset = (zero << 4) | -0x2BFF2C00 if PAIR % 2 else zero | -0x1BFF1C00  # -(64 + z), -(1024 + z), twice
        else:
            offset = zero | -0x3CFF3D00  # -(128 + z), twice
        code: tl.constexpr = ASSEMBLY[8 * (dtype == tl.bfloat16) + 4 * SCALED + PAIR]
        operands: tl.constexpr = "=r,r,r,r,r"
        both = tl.inline_asm_elementwise(code, operands, [word, offset, scale, rest], tl.int32, is_pure=True, pack=1)
        return _low_half(both, dtype), _high_half(both, dtype)
    low = (((word >> (4 * PAIR)) & 15) - (zero & 15)).to(tl.float32)
    high = (((word >> (4 * PAIR + 16)) & 15) - (zero & 15)).to(tl.float32)
    if SCALED:
        factor = _low_half(scale, dtype).to(tl.float32) + _low_half(rest, dtype).to(tl.float32)
        low, high = low * factor, high * factor
    return low.to(dtype), high.to(dtype)


@triton.jit
def unpack(word, grid, SCALED: tl.constexpr, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """Unpack words [..., c 4, t 4] into weights [..., c 4, t 4, h 2, i1 2, i0 2]; channel 32 c + 16 h + 4 t + 2 i1 + i0.

    grid: words of scale and zero point, in a shape that broadcasts with the words. Without SCALED, the result is q - z.
    """
    zero = _twice((grid >> 16) & 15)
    scale = grid
    rest = grid & 0
    if SCALED:
        value = scale_value(grid)
        rounded = value.to(dtype)
        scale = _pattern(rounded)
        if dtype == tl.bfloat16:  # a float16 scale has 11 significant bits, bfloat16 only 8: it is split in two
            rest = _pattern((value - rounded.to(tl.float32)).to(dtype))
    low0, high0 = _two_weights(word, zero, scale, rest, 0, SCALED, dtype, NATIVE)
    low1, high1 = _two_weights(word, zero, scale, rest, 1, SCALED, dtype, NATIVE)
    low2, high2 = _two_weights(word, zero, scale, rest, 2, SCALED, dtype, NATIVE)
    low3, high3 = _two_weights(word, zero, scale, rest, 3, SCALED, dtype, NATIVE)
    low = tl.join(tl.join(low0, low2), tl.join(low1, low3))
    high = tl.join(tl.join(high0, high2), tl.join(high1, high3))
    return tl.join(low, high)


@triton.jit
def _pattern(value):
    """Copy the bits of a 16-bit float into both halves of a word."""
    return _twice(value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)


@triton.jit
def scale_value(grid):
    """Return the scale, as float32, of each word of the grid."""
    return _low_half(grid, tl.float16).to(tl.float32)


@triton.jit
def narrow_product(
    words,
    grid,
    x,
    WARPS: tl.constexpr,
    BN: tl.constexpr,
    GROUPS: tl.constexpr,
    dtype: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Multiply one block of 128 channels for each warp: float32 [WARPS, BN, BM].

    words: [WARPS, BN / 16, 2, 128]; grid: [WARPS, BN, GROUPS]; x: [WARPS, 128, BM], the channels in their usual order.
    """
    words = tl.reshape(words, (WARPS, BN // 16, 2, 8, 4, 4))
    words = tl.reshape(tl.permute(words, (0, 1, 2, 3, 5, 4)), (WARPS, BN, GROUPS, 4 // GROUPS, 4))
    # With one group per block, the scale multiplies the whole product. Then q - z is exact, and it takes less time.
    weight = unpack(words, grid[:, :, :, None, None], GROUPS > 1, dtype, NATIVE)
    weight = tl.permute(weight, (0, 1, 2, 3, 5, 4, 6, 7))  # c t h i1 i0 → c h t i1 i0
    y = dot(tl.reshape(weight, (WARPS, BN, 128)), x, NATIVE)
    if GROUPS == 1:
        y = y * scale_value(tl.reshape(grid, (WARPS, BN)))[:, :, None]
    return y


@triton.jit
def wide_weight(words, grid, BN: tl.constexpr, GROUPS: tl.constexpr, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """Dequantize one block of 128 channels: [BN, 128], the channels in `mma_order`.

    words: [BN / 16, 2, 128]; grid: [BN, GROUPS].
    """
    words = tl.reshape(words, (BN // 16, 2, 8, 4, 4))
    words = tl.reshape(tl.permute(words, (0, 1, 2, 4, 3)), (BN, GROUPS, 4 // GROUPS, 4))
    weight = unpack(words, grid[:, :, None, None], True, dtype, NATIVE)
    return tl.reshape(tl.permute(weight, (0, 1, 2, 4, 5, 3, 6)), (BN, 128))  # c t h i1 i0 → c h i1 t i0


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
def prefetch(words_ptr, first, k_blocks, blocks, BN: tl.constexpr, WARPS: tl.constexpr):
    """Start loading this program's first `blocks` blocks of 128 channels into the L2 cache, each warp an equal part."""
    warp = tl.arange(0, 32 * WARPS) // 32  # a whole warp makes one request, by one instruction
    share = blocks * 256 // WARPS  # words
    for row in tl.static_range(BN // 16):
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [words_ptr + (first + row * k_blocks).to(tl.int64) * 256 + warp * share, warp * 0 + share * 4],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


#: Arguments whose values must not lead to new variants of a kernel: a request of a new length would wait for the compiler.
SIZES = ["tokens", "k_blocks", "row_tiles", "octets", "start1", "start2", "size0", "size1", "size2"]


@triton.jit(do_not_specialize=[*SIZES, "ahead"])
def narrow_kernel(
    x_ptr,  # 16-bit [T, M, 128 KB]: rotated, the channels in their usual order
    words_ptr,  # int32 [NP / 16, KB, 2, 128] (layout.KernelLayout)
    grid_ptr,  # int32 [KB · S, NP]
    bias_ptr,  # x's dtype [N]
    out_ptr,  # [M, N]
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
            prefetch(words_ptr, first_fragment, k_blocks, tl.minimum(stop - start, ahead), BN, WARPS)
        tl_cuda.gdc_wait()
    index, first, size, column = segment(tile * BN, start1, start2, size0, size1, size2)
    x_start = 0 if SHARED else index * tokens * (k_blocks * 128)
    x_row = x_start + m * (k_blocks * 128)
    real_token = m < tokens
    inner = tl.arange(0, 2)[:, None] * 128 + tl.arange(0, 128)[None, :]
    words_at = words_ptr + fragment.to(tl.int64)[None, :, None, None] * 256 + inner[None, None, :, :]
    channel = tl.arange(0, 128)
    s = tl.arange(0, GROUPS)
    acc = tl.zeros((WARPS, BN, BM), tl.float32)
    for block in tl.range(start, stop, WARPS, num_stages=STAGES):
        kb = block + part
        here = real_token[None, None, :]
        if EVEN:
            words = tl.load(words_at + kb[:, None, None, None] * 256)
            grid = tl.load(grid_ptr + (kb[:, None] * GROUPS + s[None, :])[:, None, :] * padded_rows + n[None, :, None])
        else:
            real = kb < stop
            here = here & real[:, None, None]
            words = tl.load(words_at + kb[:, None, None, None] * 256, mask=real[:, None, None, None], other=0)
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
        acc += narrow_product(words, grid, x, WARPS, BN, GROUPS, dtype, NATIVE)
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
    store_rows(y, out_ptr, bias_ptr, n - first, size, column, m, tokens, columns, HAS_BIAS)


@triton.jit(do_not_specialize=SIZES)
def wide_kernel(
    x_ptr,  # 16-bit [T, M, 128 KB]: rotated, in `mma_order`
    words_ptr,
    grid_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,  # float32 [programs, 2, BN, BM]
    arrivals_ptr,  # int32 [tiles], all zero before and after the launch
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
    inner = tl.arange(0, 2)[:, None] * 128 + tl.arange(0, 128)[None, :]
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
        words_at = words_ptr + fragment.to(tl.int64)[:, None, None] * 256 + inner[None, :, :]
        x_row = m * (k_blocks * 128)
        if not SHARED:
            x_row += index * tokens * (k_blocks * 128)
        x_at = x_ptr + x_row[None, :] + tl.arange(0, 128)[:, None]
        real_token = m < tokens
        acc = tl.zeros((BN, BM), tl.float32)
        for kb in tl.range(start, stop, num_stages=STAGES):
            words = tl.load(words_at + kb * 256)
            grid = tl.load(grid_ptr + (kb * GROUPS + s)[None, :] * padded_rows + n[:, None])
            x = tl.load(x_at + kb * 128, mask=real_token[None, :], other=0.0)
            weight = wide_weight(words, grid, BN, GROUPS, dtype, NATIVE)
            acc = tl.dot(weight, x, acc) if NATIVE else acc + dot(weight, x, NATIVE)
        whole = stop - start == k_blocks
        if not whole:
            slot = 2 * program + (start == 0).to(tl.int32)  # a program can begin within one tile and end within another
            tl.store(partial_ptr + slot.to(tl.int64) * (BN * BM) + in_tile, acc)
            tl.debug_barrier()
            first_program = (tile * k_blocks) // run
            last_program = (tile * k_blocks + k_blocks - 1) // run
            arrived = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel")
            if arrived == last_program - first_program:
                acc = tl.zeros((BN, BM), tl.float32)
                for other in range(first_program, last_program + 1):
                    slot = 2 * other + (other == first_program).to(tl.int32)
                    at = partial_ptr + slot.to(tl.int64) * (BN * BM) + in_tile
                    acc += tl.load(at, cache_modifier=".cg")
                tl.store(arrivals_ptr + tile, 0)
                whole = True
        if whole:
            store_rows(acc, out_ptr, bias_ptr, n - first, size, column, m, tokens, columns, HAS_BIAS)
        begin += stop - start


@triton.jit
def store_rows(y, out_ptr, bias_ptr, row, size, column, m, tokens, columns, HAS_BIAS: tl.constexpr):
    """Add the bias to y [BN, BM] and store it in columns `column + row` of out [M, N]."""
    real = row < size
    if HAS_BIAS:
        y += tl.load(bias_ptr + column + row, mask=real, other=0.0).to(tl.float32)[:, None]
    at = m.to(tl.int64)[None, :] * columns + (column + row)[:, None]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=real[:, None] & (m < tokens)[None, :])
