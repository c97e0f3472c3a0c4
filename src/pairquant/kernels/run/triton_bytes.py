"""Triton functions that multiply activations of 8 bits by weights of at most 4 bits, on NVIDIA GPUs.

A weight's q - z is a whole number from -15 to 15, which int8 and float8_e4m3 hold exactly. So the tensor cores multiply 8-bit
numbers, at twice the rate of 16-bit ones, and a group's scale multiplies its sum in float32: the weight is not rounded again.
For many tokens it is faster to round it again, to one scale for each row (`triton_row_bytes`).

The tensor cores' layout of 8-bit operands is that of `layout.KernelLayout`: the lane (r, t) that loads a word of 8
codes needs the channels 32 c + 16 h + 4 t + {0 … 3}, for h = 0, 1, in two registers. So here the channels of activations
are in their usual order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_unpack import scale_value

#: Adding and subtracting it rounds a float32 below 2^22 to a whole number, half to even: it leaves no bits for the rest.
ROUNDING = tl.constexpr(12582912.0)


def _int8_assembly() -> str:
    """Return assembly that turns the eight nibbles of word $2 into q - z in int8, four in $0 (h = 0), four in $1 (h = 1).

    $3 holds z four times. The bytes 128 + q never borrow from one another when z is subtracted; flipping the sign bit then
    takes the 128 away.
    """
    lines = [".reg .b32 even, odd;", "lop3.b32 even, $2, 0x0f0f0f0f, 0x80808080, 0xea;"]
    lines += ["shr.u32 odd, $2, 4;", "lop3.b32 odd, odd, 0x0f0f0f0f, 0x80808080, 0xea;"]
    for name in ("even", "odd"):
        lines += [f"sub.u32 {name}, {name}, $3;", f"xor.b32 {name}, {name}, 0x80808080;"]
    lines += ["prmt.b32 $0, even, odd, 0x6420;", "prmt.b32 $1, even, odd, 0x7531;"]
    return "{" + " ".join(lines) + "}"


def _float8_assembly() -> str:
    """Return assembly as above, for float8_e4m3, by way of float16 (see `triton_unpack`); $3 holds z twice, in 16 bits."""
    lines = [".reg .b32 word, low, high, pair, sixteenth; .reg .b16 first, second;", "mov.b32 sixteenth, 0x2c002c00;"]
    lines += [
        "or.b32 low, $3, 0xe400e400;",
        "shl.b32 high, $3, 4; or.b32 high, high, 0xd400d400;",
    ]  # -(1024 + z), -(64 + z)
    for h, source in ((0, "$2"), (1, "word")):
        if h:
            lines.append("shr.u32 word, $2, 8;")
        lines.append(f"lop3.b32 pair, {source}, 0x000F000F, 0x64006400, 0xea; add.f16x2 pair, pair, low;")
        lines.append("cvt.rn.satfinite.e4m3x2.f16x2 first, pair;")
        lines.append(f"lop3.b32 pair, {source}, 0x00F000F0, 0x64006400, 0xea;")
        lines.append("fma.rn.f16x2 pair, pair, sixteenth, high; cvt.rn.satfinite.e4m3x2.f16x2 second, pair;")
        lines.append(f"mov.b32 ${h}, {{first, second}};")
    return "{" + " ".join(lines) + "}"


INT8_ASSEMBLY, FLOAT8_ASSEMBLY = tl.constexpr(_int8_assembly()), tl.constexpr(_float8_assembly())


@triton.jit
def as_float8(x, NATIVE: tl.constexpr):
    """Round float32 numbers to float8e4nv, half to even."""
    if not NATIVE:  # the interpreter's conversion is wrong where rounding carries into the exponent
        power = (tl.abs(x).to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)
        step = tl.maximum(power, 2.0**-6) * (ROUNDING / 8)  # 3 bits of mantissa stay
        x = (x + step) - step
    return x.to(tl.float8e4nv)


@triton.jit
def _byte(word, PLACE: tl.constexpr, dtype: tl.constexpr):
    byte = (word >> (8 * PLACE)).to(tl.int8)
    return byte if dtype == tl.int8 else byte.to(dtype, bitcast=True)


@triton.jit
def _number(word, zeros, NIBBLE: tl.constexpr, dtype: tl.constexpr):
    number = ((word >> (4 * NIBBLE)) & 15) - zeros
    return number.to(tl.int8) if dtype == tl.int8 else number.to(tl.float32).to(dtype)


@triton.jit
def unpack_bytes(word, zeros, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """Turn words [..., c, t] into q - z, 8-bit [..., c, t, h 2, i1 2, i0 2]; channel 32 c + 16 h + 4 t + 2 i1 + i0."""
    word, zeros = tl.broadcast(word, zeros)
    if NATIVE:
        copies: tl.constexpr = 0x01010101 if dtype == tl.int8 else 0x00010001
        code: tl.constexpr = INT8_ASSEMBLY if dtype == tl.int8 else FLOAT8_ASSEMBLY
        first, second = tl.inline_asm_elementwise(
            code, "=r,=r,r,r", [word, zeros * copies], (tl.int32, tl.int32), is_pure=True, pack=1
        )
        low = tl.join(
            tl.join(_byte(first, 0, dtype), _byte(second, 0, dtype)),
            tl.join(_byte(first, 2, dtype), _byte(second, 2, dtype)),
        )
        high = tl.join(
            tl.join(_byte(first, 1, dtype), _byte(second, 1, dtype)),
            tl.join(_byte(first, 3, dtype), _byte(second, 3, dtype)),
        )
    else:
        low = tl.join(
            tl.join(_number(word, zeros, 0, dtype), _number(word, zeros, 2, dtype)),
            tl.join(_number(word, zeros, 1, dtype), _number(word, zeros, 3, dtype)),
        )
        high = tl.join(
            tl.join(_number(word, zeros, 4, dtype), _number(word, zeros, 6, dtype)),
            tl.join(_number(word, zeros, 5, dtype), _number(word, zeros, 7, dtype)),
        )
    return tl.join(low, high)


@triton.jit
def byte_weight(words, grid, BN: tl.constexpr, CHANNELS: tl.constexpr, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """Unpack codes of one group to q - z, 8-bit [BN, CHANNELS], the channels in their usual order.

    words: [BN, CHANNELS / 32, 4] (of `by_row`); grid: [BN].
    """
    weight = unpack_bytes(words, ((grid >> 16) & 255)[:, None, None], dtype, NATIVE)
    return tl.reshape(tl.permute(weight, (0, 1, 3, 2, 4, 5)), (BN, CHANNELS))  # c t h i1 i0 → c h t i1 i0


@triton.jit
def by_row(words, BN: tl.constexpr):
    """Arrange the words of `load_nibbles`, [1, BN / 16, 2, 128], by row: [BN, c 4, t 4]."""
    words = tl.reshape(words, (BN // 16, 2, 8, 4, 4))
    return tl.reshape(tl.permute(words, (0, 1, 2, 4, 3)), (BN, 4, 4))


@triton.jit
def halves(words, BN: tl.constexpr, PIECES: tl.constexpr):
    """Split words [BN, PIECES, 4] into those of the first and of the second half of the channels."""
    return tl.split(tl.permute(tl.reshape(words, (BN, 2, PIECES // 2, 4)), (0, 2, 3, 1)))


@triton.jit
def byte_dot(weight, x, NATIVE: tl.constexpr):
    """Compute weight · x in float32 from 8-bit operands; sums of int8 are exact."""
    if NATIVE:
        return tl.dot(weight, x).to(tl.float32)
    return tl.dot(weight.to(tl.float32), x.to(tl.float32), input_precision="ieee")


@triton.jit
def group_product(
    acc,
    other,
    words,
    grid_at,
    x,
    row,
    column,
    BN: tl.constexpr,
    HALF: tl.constexpr,
    TWO: tl.constexpr,
    CHANNELS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Add the product of one group to acc and, if TWO, to other, float32 [BN, HALF].

    x: descriptor of the activations; row, column: their first token and channel.
    """
    grid = tl.load(grid_at)
    scale = scale_value(grid)[:, None]
    weight = byte_weight(words, grid, BN, CHANNELS, x.dtype, NATIVE)
    acc += byte_dot(weight, tl.trans(x.load([row, column])), NATIVE) * scale
    if TWO:
        other += byte_dot(weight, tl.trans(x.load([row + HALF, column])), NATIVE) * scale
    return acc, other


@triton.jit
def block_product(
    acc,
    other,
    words,
    grid_at,
    padded_rows,
    x,
    row,
    column,
    BN: tl.constexpr,
    HALF: tl.constexpr,
    TWO: tl.constexpr,
    GROUPS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Do as `group_product` for one block of 128 channels, group by group.

    words: of `load_nibbles`; grid_at: pointers [BN] to the words of the block's first group.
    """
    words = by_row(words, BN)
    size: tl.constexpr = 128 // GROUPS
    if GROUPS == 1:
        acc, other = group_product(acc, other, words, grid_at, x, row, column, BN, HALF, TWO, size, NATIVE)
    elif GROUPS == 2:
        first, second = halves(words, BN, 4)
        acc, other = group_product(acc, other, first, grid_at, x, row, column, BN, HALF, TWO, size, NATIVE)
        grid_at += padded_rows
        acc, other = group_product(acc, other, second, grid_at, x, row, column + 64, BN, HALF, TWO, size, NATIVE)
    else:
        first, second = halves(words, BN, 4)
        part0, part1 = halves(first, BN, 2)
        part2, part3 = halves(second, BN, 2)
        acc, other = group_product(acc, other, part0, grid_at, x, row, column, BN, HALF, TWO, size, NATIVE)
        grid_at += padded_rows
        acc, other = group_product(acc, other, part1, grid_at, x, row, column + 32, BN, HALF, TWO, size, NATIVE)
        grid_at += padded_rows
        acc, other = group_product(acc, other, part2, grid_at, x, row, column + 64, BN, HALF, TWO, size, NATIVE)
        grid_at += padded_rows
        acc, other = group_product(acc, other, part3, grid_at, x, row, column + 96, BN, HALF, TWO, size, NATIVE)
    return acc, other
