"""Repacking: every code where `KernelLayout` says, nothing elsewhere, and back bit for bit."""

import pytest
import torch
from packed import random_packed

from pairquant.core.packing import unpack
from pairquant.kernels.run import weights as repacking
from pairquant.kernels.run.weights import KernelWeights

SIZES = [(8, 32, 32), (136, 192, 64), (272, 256, 128)]


def place(row, channel):
    """(indices of the word, nibble), as `KernelLayout` states them."""
    k, within = channel // 128, channel % 128
    c, h, t, i1, i0 = within // 32, within // 16 % 2, within // 4 % 4, within // 2 % 2, within % 2
    return (row // 16, k, row // 8 % 2, row % 8, t, c), i0 * 4 + h * 2 + i1


@pytest.mark.parametrize(("rows", "channels", "group"), SIZES)
@pytest.mark.parametrize("rows_at_a_time", [128, 4096])
def test_codes_are_where_the_layout_says_and_come_back(monkeypatch, rows, channels, group, rows_at_a_time):
    monkeypatch.setattr(repacking, "ROWS_AT_A_TIME", rows_at_a_time)
    packed = random_packed(rows, channels, group)
    weights = KernelWeights.build([packed])
    row, channel = torch.meshgrid(torch.arange(rows), torch.arange(channels), indexing="ij")
    indices, nibble = place(row, channel)
    assert torch.equal((weights.words[indices] >> (4 * nibble)) & 15, unpack(packed["qweight"], 4).T.int())
    everything = sum(((weights.words >> shift) & 15).sum() for shift in range(0, 32, 4))
    assert everything == unpack(packed["qweight"], 4).sum()  # padding is zero
    stored = weights.stored(0, packed.layout)
    assert all(torch.equal(tensor, packed[name]) for name, tensor in stored.items())


def test_each_linear_of_a_launch_comes_back():
    linears = [random_packed(rows, 192, 64, seed=seed) for seed, rows in enumerate((136, 8, 128))]
    weights = KernelWeights.build(linears)
    for index, linear in enumerate(linears):
        stored = weights.stored(index, linear.layout)
        assert all(torch.equal(tensor, linear[name]) for name, tensor in stored.items())
