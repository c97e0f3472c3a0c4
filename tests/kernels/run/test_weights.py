"""Repacking: every code where `KernelLayout` says, nothing elsewhere, and back bit for bit."""

import pytest
import torch
from packed import random_packed

from pairquant.core.packing import unpack
from pairquant.kernels.run import weights as repacking
from pairquant.kernels.run.weights import KernelWeights

SIZES = [(32, 32, 32), (160, 192, 64), (288, 256, 128)]
BITS = (2, 3, 4, 5, 6, 8)
#: Width → the widths of the parts that its codes are stored in, from the low bits on.
PARTS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (4, 4)}


def place(row, channel):
    """(R, kb, rh, word within 128, nibble), as `KernelLayout` states them."""
    k, within = channel // 128, channel % 128
    c, h, t, i1, i0 = within // 32, within // 16 % 2, within // 4 % 4, within // 2 % 2, within % 2
    return row // 16, k, row // 8 % 2, row % 8 * 16 + t * 4 + c, i0 * 4 + h * 2 + i1


def read(words, row, channel, bits):
    """The code of each row and channel, from the words where `KernelLayout` says that its parts are."""
    fragment, k, half, word, nibble = place(row, channel)
    code, below, first = torch.zeros_like(row), 0, 0
    for part in PARTS[bits]:
        at, shift = {
            4: (half * 128 + word, 4 * nibble),
            2: (word, 4 * nibble + 2 * half),
            1: (word // 2, 4 * nibble + word % 2 + 2 * half),
        }[part]
        code += ((words[fragment, k, first + at] >> shift) & (2**part - 1)) << below
        below, first = below + part, first + 64 * part
    return code


def ones(words):
    return sum(int(((words >> shift) & 1).sum()) for shift in range(32))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "channels", "group"), SIZES)
@pytest.mark.parametrize("rows_at_a_time", [128, 4096])
def test_codes_are_where_the_layout_says_and_come_back(monkeypatch, rows, channels, group, rows_at_a_time, bits):
    monkeypatch.setattr(repacking, "ROWS_AT_A_TIME", rows_at_a_time)
    packed = random_packed(rows, channels, group, bits=bits)
    weights = KernelWeights.build([packed])
    assert weights.bits == bits
    row, channel = torch.meshgrid(torch.arange(rows), torch.arange(channels), indexing="ij")
    codes = unpack(packed["qweight"], bits)
    assert torch.equal(read(weights.words, row, channel, bits), codes.T.long())
    assert ones(weights.words) == ones(codes.int()), "padding is zero"
    stored = weights.stored(0, packed.layout)
    assert all(torch.equal(tensor, packed[name]) for name, tensor in stored.items())


@pytest.mark.parametrize(("bits", "form"), [*((bits, None) for bits in BITS), (4, "mxfp4")])
def test_each_linear_of_a_launch_comes_back(bits, form):
    linears = [
        random_packed(rows, 192, 64, seed=seed, bits=bits, weights=form) for seed, rows in enumerate((160, 32, 128))
    ]
    weights = KernelWeights.build(linears)
    assert weights.floating == (form is not None)
    for index, linear in enumerate(linears):
        stored = weights.stored(index, linear.layout)
        assert all(torch.equal(tensor, linear[name]) for name, tensor in stored.items())
