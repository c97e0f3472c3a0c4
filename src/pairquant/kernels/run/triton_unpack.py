"""Unpack codes in registers, directly into the operand layout of the tensor cores (see layout.KernelLayout).

Codes of every width become nibbles first, eight to a word: those of 2 and 3 bits one, those of 5, 6 and 8 bits a low and a
high one. Where the grid is of float32, codes are the floats of MXFP4 (`spec.mx`), one nibble each.

Half of the time for a weight is unpacking. The assembly below needs 0.6 integer instructions per weight. The compiler's code
would need about 3, and that would take longer than reading the weights: for one block of an 8B model, an H100 needs 15 us
for each instruction per weight, and 46 us to read the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

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


def _float_assembly(pair: int, dtype: str, scaled: int) -> str:
    """Return assembly that turns nibbles `pair` and `pair + 4` of word $1 into two 16-bit floats, times the scale $2 if `scaled`.

    A nibble holds a sign, two bits of exponent and one of mantissa. Put in the places of those of a 16-bit float, whose other
    bits are zero, they make the value times 2^-14 (float16) or 2^-126 (bfloat16): exponents count from 15 and 127 there, and
    from 1 here, and an exponent of zero means the same. One exact product makes the value.
    """
    kind, down, body, factor = (
        ("f16x2", 3, 0x0E000E00, 0x74007400) if dtype == "fp16" else ("bf16x2", 6, 0x01C001C0, 0x7E807E80)
    )
    lines = [".reg .b32 a, b, none;", f"shl.b32 a, $1, {12 - 4 * pair};" if pair < 3 else "mov.b32 a, $1;"]
    lines.append(f"shr.u32 b, a, {down}; and.b32 b, b, {body}; lop3.b32 a, a, 0x80008000, b, 0xea;")
    # -0 is added because products alone need compute capability 9.0 in bfloat16.
    lines.append(f"mov.b32 none, 0x80008000; mov.b32 b, {factor}; fma.rn.{kind} a, a, b, none;")
    lines.append(f"fma.rn.{kind} $0, a, $2, none;" if scaled else "mov.b32 $0, a;")
    return "{" + " ".join(lines) + "}"


#: The assembly at the same index.
FLOATS = tl.constexpr(
    tuple(_float_assembly(pair, dtype, scaled) for dtype in ("fp16", "bf16") for scaled in (0, 1) for pair in range(4))
)


def _joined_assembly(dtype: str, scaled: int) -> str:
    """Return assembly that adds 16 times the pair $2 to the pair $1 and, if `scaled`, multiplies by $3 (+ $4), as above."""
    kind, sixteen = ("f16x2", "0x4c004c00") if dtype == "fp16" else ("bf16x2", "0x41804180")
    lines = [".reg .b32 a, rest;", f"mov.b32 rest, {sixteen}; fma.rn.{kind} a, $2, rest, $1;"]
    if not scaled:
        lines.append("mov.b32 $0, a;")
    elif dtype == "fp16":
        lines.append("mul.f16x2 $0, a, $3;")
    else:
        lines.append("mov.b32 rest, 0x80008000; fma.rn.bf16x2 rest, a, $4, rest; fma.rn.bf16x2 $0, a, $3, rest;")
    return "{" + " ".join(lines) + "}"


#: The assembly at index 2 · (1 for bfloat16) + scaled.
JOINED = tl.constexpr(tuple(_joined_assembly(dtype, scaled) for dtype in ("fp16", "bf16") for scaled in (0, 1)))


@triton.jit
def _part(at, real, FIRST: tl.constexpr, WORDS: tl.constexpr, ALL: tl.constexpr):
    """Load words FIRST … FIRST + WORDS - 1 of each block: at, real [A, F, 1] → [A, F, WORDS]."""
    at = at + FIRST + tl.arange(0, WORDS)[None, None, :]
    return tl.load(at) if ALL else tl.load(at, mask=real, other=0)


@triton.jit
def _halves(low, high):
    """Join the nibbles of rows 0 to 7 and 8 to 15, both [A, F, 128], to [A, F, 2, 128]."""
    return tl.permute(tl.join(low, high), (0, 1, 3, 2))


@triton.jit
def _twos(words):
    """Make nibbles of codes, or parts of codes, of 2 bits: [A, F, 128] → [A, F, 2, 128]."""
    return _halves(words & 0x33333333, (words >> 2) & 0x33333333)


@triton.jit
def _ones(words, A: tl.constexpr, F: tl.constexpr):
    """Make nibbles of codes, or parts of codes, of 1 bit: [A, F, 64] → [A, F, 2, 128]."""
    words = tl.reshape(tl.join(words, words >> 1), (A, F, 128))
    return _halves(words & 0x11111111, (words >> 2) & 0x11111111)


@triton.jit
def load_nibbles(at, real, A: tl.constexpr, F: tl.constexpr, BITS: tl.constexpr, ALL: tl.constexpr):
    """Load the codes of blocks of 16 rows and 128 channels as nibbles: two int32 [A, F, 2, 128].

    at: pointers [A, F, 1] to the blocks' first words; real: whether there is such a block, looked at unless ALL. The second
    result has the bits from the fifth on, and is the first again where there are none.
    """
    if BITS >= 4:
        inner = tl.arange(0, 2)[:, None] * 128 + tl.arange(0, 128)[None, :]
        low_at = at[:, :, :, None] + inner[None, None, :, :]
        low = tl.load(low_at) if ALL else tl.load(low_at, mask=real[:, :, :, None], other=0)
    else:
        low = _twos(_part(at, real, 0, 128, ALL))
        if BITS == 3:
            low = low | (_ones(_part(at, real, 128, 64, ALL), A, F) << 2)
    high = low
    if BITS == 5:
        high = _ones(_part(at, real, 256, 64, ALL), A, F)
    if BITS == 6:
        high = _twos(_part(at, real, 256, 128, ALL))
    if BITS == 8:
        high_at = at[:, :, :, None] + 256 + tl.arange(0, 2)[None, None, :, None] * 128
        high_at += tl.arange(0, 128)[None, None, None, :]
        high = tl.load(high_at) if ALL else tl.load(high_at, mask=real[:, :, :, None], other=0)
    return low, high


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
def _from_nibbles(word, zero, scale, rest, PAIR: tl.constexpr, SCALED: tl.constexpr, dtype: tl.constexpr):
    """Turn nibbles PAIR and PAIR + 4 of each word into two 16-bit q - z, or (q - z) · s if SCALED, in one word."""
    if dtype == tl.float16:  # noqa: SIM108
        offset = (zero << 4) | -0x2BFF2C00 if PAIR % 2 else zero | -0x1BFF1C00  # -(64 + z), -(1024 + z), twice
    else:
        offset = zero | -0x3CFF3D00  # -(128 + z), twice
    code: tl.constexpr = ASSEMBLY[8 * (dtype == tl.bfloat16) + 4 * SCALED + PAIR]
    return tl.inline_asm_elementwise(code, "=r,r,r,r,r", [word, offset, scale, rest], tl.int32, is_pure=True, pack=1)


@triton.jit
def _two_weights(
    word,
    high,
    zeros,
    scale,
    rest,
    PAIR: tl.constexpr,
    SCALED: tl.constexpr,
    BITS: tl.constexpr,
    dtype: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Turn codes PAIR and PAIR + 4 of each word into q - z, or (q - z) · s if SCALED: two tensors of the word's shape."""
    word, zeros = tl.broadcast(word, zeros)
    word, scale = tl.broadcast(word, scale)
    word, rest = tl.broadcast(word, rest)
    if NATIVE:
        both = _from_nibbles(word, _twice(zeros & 15), scale, rest, PAIR, SCALED and BITS <= 4, dtype)
        if BITS > 4:
            upper = _from_nibbles(high, _twice(zeros >> 4), scale, rest, PAIR, False, dtype)
            joined: tl.constexpr = JOINED[2 * (dtype == tl.bfloat16) + SCALED]
            both = tl.inline_asm_elementwise(
                joined, "=r,r,r,r,r", [both, upper, scale, rest], tl.int32, is_pure=True, pack=1
            )
        return _low_half(both, dtype), _high_half(both, dtype)
    first = (word >> (4 * PAIR)) & 15
    second = (word >> (4 * PAIR + 16)) & 15
    if BITS > 4:
        first += ((high >> (4 * PAIR)) & 15) << 4
        second += ((high >> (4 * PAIR + 16)) & 15) << 4
    first = (first - zeros).to(tl.float32)
    second = (second - zeros).to(tl.float32)
    if SCALED:
        factor = _low_half(scale, dtype).to(tl.float32) + _low_half(rest, dtype).to(tl.float32)
        first, second = first * factor, second * factor
    return first.to(dtype), second.to(dtype)


@triton.jit
def _float_value(code):
    """Return the value of E2M1 codes in the low four bits of int32, float32: its steps are 0.5 to 2, 1 to 4 and 2 to 6."""
    size = (code & 7).to(tl.float32)
    value = tl.maximum(tl.maximum(size * 0.5, size - 2.0), size * 2.0 - 8.0)
    return tl.where((code & 8) != 0, -value, value)


@triton.jit
def _two_floats(word, scale, PAIR: tl.constexpr, SCALED: tl.constexpr, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """Turn E2M1 codes PAIR and PAIR + 4 of each word into their values, times the scale if SCALED: as `_two_weights`."""
    word, scale = tl.broadcast(word, scale)
    if NATIVE:
        code: tl.constexpr = FLOATS[8 * (dtype == tl.bfloat16) + 4 * SCALED + PAIR]
        both = tl.inline_asm_elementwise(code, "=r,r,r", [word, scale], tl.int32, is_pure=True, pack=1)
        return _low_half(both, dtype), _high_half(both, dtype)
    first, second = _float_value(word >> (4 * PAIR)), _float_value(word >> (4 * PAIR + 16))
    if SCALED:
        factor = _low_half(scale, dtype).to(tl.float32)
        first, second = first * factor, second * factor
    return first.to(dtype), second.to(dtype)


@triton.jit
def unpack(word, high, grid, SCALED: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """Unpack words [..., c 4, t 4] into weights [..., c 4, t 4, h 2, i1 2, i0 2]; channel 32 c + 16 h + 4 t + 2 i1 + i0.

    word, high: of `load_nibbles`; grid: words of scale and zero point, in a shape that broadcasts with the words, or for
    codes that are floats, scales alone, powers of two in float32. Without SCALED, the result is q - z, or the float.
    """
    if grid.dtype == tl.float32:
        return _unpack_floats(word, grid, SCALED, dtype, NATIVE)
    else:  # the compiler reads what follows a return
        return _unpack_whole(word, high, grid, SCALED, BITS, dtype, NATIVE)


@triton.jit
def _unpack_floats(word, grid, SCALED: tl.constexpr, dtype: tl.constexpr, NATIVE: tl.constexpr):
    scale = _pattern(grid.to(dtype))
    low0, high0 = _two_floats(word, scale, 0, SCALED, dtype, NATIVE)
    low1, high1 = _two_floats(word, scale, 1, SCALED, dtype, NATIVE)
    low2, high2 = _two_floats(word, scale, 2, SCALED, dtype, NATIVE)
    low3, high3 = _two_floats(word, scale, 3, SCALED, dtype, NATIVE)
    return _joined(low0, low1, low2, low3, high0, high1, high2, high3)


@triton.jit
def _unpack_whole(
    word, high, grid, SCALED: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr, NATIVE: tl.constexpr
):
    zeros = (grid >> 16) & 255
    scale = grid
    rest = grid & 0
    if SCALED:
        value = scale_value(grid)
        rounded = value.to(dtype)
        scale = _pattern(rounded)
        if dtype == tl.bfloat16:  # a float16 scale has 11 significant bits, bfloat16 only 8: it is split in two
            rest = _pattern((value - rounded.to(tl.float32)).to(dtype))
    low0, high0 = _two_weights(word, high, zeros, scale, rest, 0, SCALED, BITS, dtype, NATIVE)
    low1, high1 = _two_weights(word, high, zeros, scale, rest, 1, SCALED, BITS, dtype, NATIVE)
    low2, high2 = _two_weights(word, high, zeros, scale, rest, 2, SCALED, BITS, dtype, NATIVE)
    low3, high3 = _two_weights(word, high, zeros, scale, rest, 3, SCALED, BITS, dtype, NATIVE)
    return _joined(low0, low1, low2, low3, high0, high1, high2, high3)


@triton.jit
def _joined(low0, low1, low2, low3, high0, high1, high2, high3):
    """Join what the eight codes of a word stand for: [..., h 2, i1 2, i0 2]."""
    low = tl.join(tl.join(low0, low2), tl.join(low1, low3))
    upper = tl.join(tl.join(high0, high2), tl.join(high1, high3))
    return tl.join(low, upper)


@triton.jit
def _pattern(value):
    """Copy the bits of a 16-bit float into both halves of a word."""
    return _twice(value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)


@triton.jit
def scale_value(grid):
    """Return the scale, as float32, of each word of the grid, or of each scale alone."""
    if grid.dtype == tl.float32:
        return grid
    else:
        return _low_half(grid, tl.float16).to(tl.float32)


@triton.jit
def _narrow_order(words, WARPS: tl.constexpr, BN: tl.constexpr, GROUPS: tl.constexpr):
    words = tl.reshape(words, (WARPS, BN // 16, 2, 8, 4, 4))
    return tl.reshape(tl.permute(words, (0, 1, 2, 3, 5, 4)), (WARPS, BN, GROUPS, 4 // GROUPS, 4))


@triton.jit
def narrow_product(
    words,
    high,
    grid,
    x,
    WARPS: tl.constexpr,
    BN: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    dtype: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Multiply one block of 128 channels for each warp: float32 [WARPS, BN, BM].

    words, high: [WARPS, BN / 16, 2, 128], of `load_nibbles`; grid: [WARPS, BN, GROUPS]; x: [WARPS, 128, BM], the channels in
    their usual order.
    """
    words = _narrow_order(words, WARPS, BN, GROUPS)
    if BITS > 4:
        high = _narrow_order(high, WARPS, BN, GROUPS)
    # With one group per block, the scale multiplies the whole product. Then q - z is exact, and it takes less time.
    weight = unpack(words, high, grid[:, :, :, None, None], GROUPS > 1, BITS, dtype, NATIVE)
    weight = tl.permute(weight, (0, 1, 2, 3, 5, 4, 6, 7))  # c t h i1 i0 → c h t i1 i0
    y = dot(tl.reshape(weight, (WARPS, BN, 128)), x, NATIVE)
    if GROUPS == 1:
        y = y * scale_value(tl.reshape(grid, (WARPS, BN)))[:, :, None]
    return y


@triton.jit
def _wide_order(words, BN: tl.constexpr, GROUPS: tl.constexpr):
    words = tl.reshape(words, (BN // 16, 2, 8, 4, 4))
    return tl.reshape(tl.permute(words, (0, 1, 2, 4, 3)), (BN, GROUPS, 4 // GROUPS, 4))


@triton.jit
def wide_weight(
    words,
    high,
    grid,
    SCALED: tl.constexpr,
    BN: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    dtype: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Dequantize one block of 128 channels, or, unless SCALED, return q - z: [BN, 128], the channels in `mma_order`.

    words, high: [1, BN / 16, 2, 128], of `load_nibbles`; grid: [BN, GROUPS].
    """
    words = _wide_order(words, BN, GROUPS)
    if BITS > 4:
        high = _wide_order(high, BN, GROUPS)
    weight = unpack(words, high, grid[:, :, None, None], SCALED, BITS, dtype, NATIVE)
    return tl.reshape(tl.permute(weight, (0, 1, 2, 4, 5, 3, 6)), (BN, 128))  # c t h i1 i0 → c h i1 t i0
