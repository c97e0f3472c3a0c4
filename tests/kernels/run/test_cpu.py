"""What is prepared for the CPU's int4 product."""

import pytest
import torch
from packed import random_packed

from pairquant.core.linear import decode, forward
from pairquant.core.rotation import rotation_matrix
from pairquant.kernels.run import cpu


def test_scales_are_folded_into_the_rotation():
    packed = random_packed(32, 128, 64, rotations=3)
    matrix = cpu.CpuWeights.build(packed).matrix
    assert (matrix.dtype, matrix.shape) == (torch.float32, (2, 64, 64))
    rotation = rotation_matrix(packed["theta"].float(), packed["pairs"], 64)
    folded = packed["channel_scales"].float().view(2, 64, 1) * rotation
    torch.testing.assert_close(matrix, folded, rtol=1e-5, atol=1e-5)


def test_the_grid_is_the_stored_one_in_bfloat16():
    packed = random_packed(32, 128, 64)
    grid = cpu.CpuWeights.build(packed).grid
    assert (grid.dtype, grid.shape) == (torch.bfloat16, (2, 32, 2))
    assert torch.equal(grid[..., 0], packed["scales"].bfloat16())


@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_product_is_the_reference_s_at_a_dense_layer_s_noise(group):
    packed = random_packed(64, 256, group, bias=True)
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = packed.bias.bfloat16()
    want = forward(packed, x).double()
    dense = x @ decode(packed).bfloat16().T + bias
    found = cpu.rotated_linear(x, cpu.CpuWeights.build(packed), bias, group)
    assert found.dtype == torch.bfloat16
    # Two more roundings than a dense layer has: of the rotated input, and of the scales.
    assert (found.double() - want).norm() < 1.5 * (dense.double() - want).norm()
    without = cpu.rotated_linear(x, cpu.CpuWeights.build(packed), None, group)
    assert torch.equal(without + bias, found)


def test_without_rotations_channels_are_scaled_one_by_one():
    packed = random_packed(32, 128, 64, rotations=0)
    weights = cpu.CpuWeights.build(packed)
    assert weights.matrix.shape == (2, 64, 1)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    want = forward(packed, x).double()
    dense = (x @ decode(packed).bfloat16().T).double()
    assert (cpu.rotated_linear(x, weights, None, 64).double() - want).norm() < 1.5 * (dense - want).norm()
    found = cpu.decode(weights, 64)
    assert (found - decode(packed)).norm() / decode(packed).norm() < 5e-3


def test_the_packed_weight_is_decoded_by_its_own_product():
    packed = random_packed(32, 128, 64)
    found, want = cpu.decode(cpu.CpuWeights.build(packed), 64), decode(packed)
    assert (found - want).norm() / want.norm() < 5e-3
