"""Unpack 4-bit codes in registers, directly into the operand layout of the tensor cores (see layout.KernelLayout).

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
