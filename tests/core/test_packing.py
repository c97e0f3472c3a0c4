"""Codes ↔ words: exact inverses, and the bit order by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pairquant.core.packing import pack, unpack
from pairquant.spec.codes import SUPPORTED_BITS, columns_per_block


def words(*unsigned: int) -> torch.Tensor:
    """One row of words, given as unsigned numbers, as int32 stores them."""
    return torch.tensor([[word - 2**32 if word >= 2**31 else word for word in unsigned]], dtype=torch.int32)


@given(st.data(), st.sampled_from(SUPPORTED_BITS), st.integers(1, 3), st.integers(1, 3))
def test_unpack_undoes_pack(data, bits, rows, blocks):
    columns = blocks * columns_per_block(bits)
    code = st.integers(0, 2**bits - 1)
    codes = data.draw(st.lists(code, min_size=rows * columns, max_size=rows * columns))
    codes = torch.tensor(codes, dtype=torch.uint8).view(rows, columns)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, columns * bits // 32)
    unpacked = unpack(packed, bits)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@given(st.data(), st.sampled_from(SUPPORTED_BITS))
def test_pack_undoes_unpack_for_any_words(data, bits):
    per_block = columns_per_block(bits) * bits // 32
    word = st.integers(-(2**31), 2**31 - 1)
    packed = torch.tensor([data.draw(st.lists(word, min_size=per_block, max_size=per_block))], dtype=torch.int32)
    assert torch.equal(pack(unpack(packed, bits), bits), packed)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("fill", [0, -1])
def test_all_codes_lowest_and_highest(bits, fill):
    codes = torch.full((2, 2 * columns_per_block(bits)), fill % 2**bits, dtype=torch.uint8)
    assert (pack(codes, bits) == fill).all()
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


def test_four_bits_lie_in_awq_order():
    # Nibbles, lowest first, hold columns 0 2 4 6 1 3 5 7; column c holds code c + 1.
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
    assert torch.equal(pack(codes, 4), words(0x8642_7531))
    assert torch.equal(unpack(words(0x8642_7531), 4), codes)


@pytest.mark.parametrize(("column", "nibble"), zip((0, 2, 4, 6, 1, 3, 5, 7), range(8), strict=True))
def test_each_column_of_a_word_has_its_nibble(column, nibble):
    codes = torch.zeros(1, 16, dtype=torch.uint8)
    codes[0, 8 + column] = 15
    assert torch.equal(pack(codes, 4), words(0, 0xF << 4 * nibble))


def test_the_top_nibble_reaches_the_sign_bit():
    codes = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 15]], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [[-(2**28)]]  # 0xF0000000 read as a signed number
    assert torch.equal(unpack(torch.tensor([[-(2**28)]], dtype=torch.int32), 4), codes)


def test_two_bits_lie_in_natural_order():
    codes = torch.tensor([[0, 1, 2, 3] * 4], dtype=torch.uint8)
    assert torch.equal(pack(codes, 2), words(0xE4E4_E4E4))


def test_three_bits_straddle_words():
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 10], codes[0, 21] = 0b101, 0b011  # bits 30 to 32 and 63 to 65
    assert torch.equal(pack(codes, 3), words(1 << 30, (1 << 31) | 1, 1))
    assert torch.equal(unpack(pack(codes, 3), 3), codes)


def test_eight_bits_are_bytes():
    codes = torch.tensor([[1, 2, 3, 255]], dtype=torch.uint8)
    assert torch.equal(pack(codes, 8), words(0xFF03_0201))


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_rows_are_packed_by_themselves(bits, generator):
    codes = torch.randint(0, 2**bits, (5, 64), generator=generator).to(torch.uint8)
    assert torch.equal(pack(codes, bits), torch.cat([pack(row[None], bits) for row in codes]))
