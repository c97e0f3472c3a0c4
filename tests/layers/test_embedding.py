"""The input embedding: planes of codes are exact, rows are those of the decoded weight, and what was stored comes back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import random_packed

from pairquant.core.linear import decode
from pairquant.layers.embedding import PLANES, RotatedEmbedding, Rows, RowScale, of_planes, to_planes
from pairquant.spec.codes import SUPPORTED_BITS


@given(st.sampled_from(SUPPORTED_BITS), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))
def test_planes_give_the_codes_back_and_take_no_more_than_them(bits, rows, eighths, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, 8 * eighths), generator=generator, dtype=torch.uint8)
    planes = to_planes(codes, bits)
    assert sum(plane.numel() for plane in planes) * 8 == codes.numel() * bits == codes.numel() * sum(PLANES[bits])
    assert torch.equal(of_planes(planes, bits), codes)


def embedding(bits=4, rotations=2, **options):
    packed = random_packed(96, 64, 32, bits=bits, rotations=rotations)
    layer = RotatedEmbedding(packed.layout, **options)
    layer.load_state_dict(packed.tensors)
    return layer, packed


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("rotations", [0, 2])
def test_rows_are_those_of_the_decoded_weight(bits, rotations):
    layer, packed = embedding(bits, rotations)
    tokens = torch.tensor([[0, 95, 7], [7, 31, 32]])
    found = layer(tokens)
    assert found.shape == (2, 3, 64)
    torch.testing.assert_close(found, decode(packed)[tokens], rtol=1e-5, atol=1e-6)
    assert layer(tokens[:0]).shape == (0, 3, 64)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_what_was_stored_comes_back_bit_for_bit(bits):
    layer, packed = embedding(bits)
    layer(torch.tensor([1]))
    assert layer.qweight.numel() == 0  # the rearranged codes are in its place, not beside it
    for state in (layer.state_dict(), layer.half().state_dict(), layer.packed.tensors):
        assert set(state) == set(packed.tensors)
        assert all(
            torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype
            for name, tensor in packed.tensors.items()
        )
    assert layer(torch.tensor([1])).dtype == layer.weight.dtype == torch.float16


def test_the_factor_is_applied_in_the_dtype_of_the_rows():
    layer, packed = embedding(dtype=torch.bfloat16, scale=RowScale(64**0.5 + 0.01, rounded=True))
    rounded = torch.tensor(64**0.5 + 0.01, dtype=torch.bfloat16)
    assert torch.equal(layer(torch.arange(9)), decode(packed)[:9].bfloat16() * rounded)
    assert RowScale(1.01, rounded=False).in_dtype(torch.bfloat16) == 1.01


def test_rows_know_their_other_tensors():
    _, packed = embedding()
    rows = Rows.of(packed)
    assert Rows(rows.planes, **rows.others()) == rows
