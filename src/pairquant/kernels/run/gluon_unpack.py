"""Load and unpack weights in Gluon, as `triton_unpack` does in Triton, for `gluon_overlapped`; codes of 4 bits."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .triton_unpack import ASSEMBLY


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
def unpack_half(words, grid, dtype: gl.constexpr):
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
def halves(words, HALF: gl.constexpr):
    """Split words [8, 2, 8, 4, c 4] into those of c = 0, 1 and of c = 2, 3, in the layout HALF."""
    first, second = gl.split(gl.permute(gl.reshape(words, (8, 2, 8, 4, 2, 2)), (0, 1, 2, 3, 5, 4)))
    first = gl.convert_layout(first, HALF, assert_trivial=True)
    return first, gl.convert_layout(second, HALF, assert_trivial=True)


@gluon.jit
def row_of(LAYOUT: gl.constexpr):
    """Return the row in its tile of each word: [8, 2, 8, 1, 1]."""
    L3: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, LAYOUT))
    fragment = gl.arange(0, 8, layout=gl.SliceLayout(1, gl.SliceLayout(2, L3)))[:, None][:, :, None]
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, L3)))[None, :][:, :, None]
    r = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, L3)))[None, :][:, None, :]
    return (fragment * 16 + half * 8 + r)[:, :, :, None][:, :, :, :, None]


@gluon.jit
def last_of(SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """Return 0 … SIZE - 1 along the last of five dimensions."""
    L1: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT)))
    last = gl.arange(0, SIZE, layout=gl.SliceLayout(0, L1))
    return last[None, :][:, None, :][:, :, None, :][:, :, :, None, :]


@gluon.jit
def word_of(k_blocks, LAYOUT: gl.constexpr):
    """Return the place of each word of a tile's block: [8, rh 2, r 8, t 4, c 4] (see `KernelLayout`)."""
    L4: gl.constexpr = gl.SliceLayout(4, LAYOUT)
    L3: gl.constexpr = gl.SliceLayout(3, L4)
    fragment = gl.arange(0, 8, layout=gl.SliceLayout(1, gl.SliceLayout(2, L3)))[:, None][:, :, None]
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, L3)))[None, :][:, :, None]
    r = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, L3)))[None, :][:, None, :]
    t = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L4))))
    t = t[None, :][:, None, :][:, :, None, :][:, :, :, :, None]
    rows = (fragment * (k_blocks * 256) + half * 128 + r * 16)[:, :, :, None][:, :, :, :, None]
    return rows + t * 4 + last_of(4, LAYOUT)


@gluon.jit
def load_codes(words_at, grid_at, block, end, k_blocks, token_tiles, padded_rows, GROUPS: gl.constexpr):
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
