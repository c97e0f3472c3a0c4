"""What is prepared for the CPU's int4 product."""

import pytest
import torch
from packed import random_packed

from pairquant.core.linear import decode, forward, rotated_weight
from pairquant.core.packing import unpack
from pairquant.core.rotation import rotate_dense, rotation_matrix
from pairquant.kernels.run import cpu


def test_scales_are_folded_into_the_rotation():
    packed = random_packed(32, 128, 64, rotations=3)
    (matrix,) = cpu.build(packed).matrix
    assert (matrix.dtype, matrix.shape) == (torch.float32, (2, 64, 64))
    rotation = rotation_matrix(packed["theta"].float(), packed["pairs"], 64)
    folded = packed["channel_scales"].float().view(2, 64, 1) * rotation
    torch.testing.assert_close(matrix, folded, rtol=1e-5, atol=1e-5)


def test_the_grid_is_the_stored_one_in_bfloat16():
    packed = random_packed(32, 128, 64)
    grid = cpu.build(packed).codes[0].grid
    assert (grid.dtype, grid.shape) == (torch.bfloat16, (2, 32, 2))
    assert torch.equal(grid[..., 0], packed["scales"].bfloat16())


@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_product_is_the_reference_s_at_a_dense_layer_s_noise(group):
    packed = random_packed(64, 256, group, bias=True)
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = packed.bias.bfloat16()
    want = forward(packed, x).double()
    dense = x @ decode(packed).bfloat16().T + bias
    found = cpu.rotated_linear(x, cpu.build(packed), bias, group)
    assert found.dtype == torch.bfloat16
    # Two more roundings than a dense layer has: of the rotated input, and of the scales.
    assert (found.double() - want).norm() < 1.5 * (dense.double() - want).norm()
    without = cpu.rotated_linear(x, cpu.build(packed), None, group)
    assert torch.equal(without + bias, found)


def test_without_rotations_channels_are_scaled_one_by_one():
    packed = random_packed(32, 128, 64, rotations=0)
    weights = cpu.build(packed)
    assert weights.matrix.shape == (1, 2, 64, 1)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    want = forward(packed, x).double()
    dense = (x @ decode(packed).bfloat16().T).double()
    assert (cpu.rotated_linear(x, weights, None, 64).double() - want).norm() < 1.5 * (dense - want).norm()
    found = cpu.decode(weights.matrix[0], weights.codes[0], 64)
    assert (found - decode(packed)).norm() / decode(packed).norm() < 5e-3


def test_the_packed_weight_is_decoded_by_its_own_product():
    packed = random_packed(32, 128, 64)
    weights = cpu.build(packed)
    found, want = cpu.decode(weights.matrix[0], weights.codes[0], 64), decode(packed)
    assert (found - want).norm() / want.norm() < 5e-3


@pytest.fixture(params=[True, False], ids=["bfloat16 instructions", "none"])
def instructions(request, monkeypatch):
    """Whether the CPU is said to multiply bfloat16; both ways compute on every CPU."""
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: request.param)
    return request.param


def noise(packed, x, found):
    """Its error over that of a dense layer in bfloat16."""
    want = forward(packed, x).double()
    return float((found.double() - want).norm() / ((x @ decode(packed).bfloat16().T).double() - want).norm())


@pytest.mark.parametrize("tokens", [1, cpu.FEW_TOKENS, cpu.FEW_TOKENS + 1, 300])
@pytest.mark.parametrize(("rows", "channels", "group"), [(48, 192, 64), (208, 96, 32), (64, 384, 128)])
def test_every_number_of_tokens_is_the_reference_s(instructions, monkeypatch, rows, channels, group, tokens):
    monkeypatch.setattr(cpu, "TILE", 64 * channels)  # several tiles, the last one smaller
    monkeypatch.setattr(cpu, "ROTATED", 100 * channels)  # several parts of the tokens
    packed = random_packed(rows, channels, group, 3)
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(1)).bfloat16()
    weights = cpu.build(packed)
    assert len(weights.codes[0].rows) == (rows * channels // group if instructions else 0)
    assert noise(packed, x, cpu.rotated_linear(x, weights, None, group)) < 1.7


def test_decoded_rows_are_the_stored_weight_to_fp16():
    packed = random_packed(48, 192, 64)
    codes = unpack(packed["qweight"], 4).T.contiguous()
    zeros = unpack(packed["qzeros"], 4).float()
    rows = cpu._rows(codes, packed["scales"].float(), zeros)
    found = torch.ops.quantized.embedding_bag_4bit_unpack(rows).view(48, 192)
    # Only the zero point times the scale is rounded, to 11 bits of at most 15 scales.
    bound = 15 * packed["scales"].float().T.repeat_interleave(64, 1) * 2**-11
    assert ((found - rotated_weight(packed)).abs() <= bound).all()


@pytest.mark.parametrize("tokens", [2, 40])
def test_scales_whose_zero_points_fp16_cannot_hold(instructions, tokens):
    packed = random_packed(32, 128, 64)
    scales = packed["scales"].clone()
    scales[0, 0] = 60000.0
    packed = packed.with_tensors(scales=scales, qzeros=torch.full_like(packed["qzeros"], -1))
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert noise(packed, x, cpu.rotated_linear(x, cpu.build(packed), None, 64)) < 1.7


def test_rotating_by_several_transforms_is_rotating_by_each():
    matrix = torch.cat([cpu.build(random_packed(32, 128, 64, seed=seed)).matrix for seed in range(3)])
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    for found, one in zip(cpu.rotated(x, matrix), matrix, strict=True):
        assert torch.equal(found, rotate_dense(x.float(), one).bfloat16())


def test_the_same_input_gives_the_same_bits(instructions):
    packed = random_packed(208, 192, 64)
    for tokens in (5, 70):
        x = torch.randn(tokens, 192, generator=torch.Generator().manual_seed(1)).bfloat16()
        first, second = (cpu.rotated_linear(x.clone(), cpu.build(packed), None, 64) for _ in range(2))
        assert torch.equal(first, second)
