"""Products of 8-bit integers on CPUs against the reference."""

import pytest
import torch
from packed import check_rounded, random_packed, with_uneven_groups

from pairquant.kernels.run import cpu, cpu_int8
from pairquant.kernels.run.cpu_int8 import BYTES_FROM, Int8Weights, products_are_exact

needs_exact_products = pytest.mark.skipif(
    not products_are_exact(), reason="PyTorch's int8 products overflow on this CPU"
)


@needs_exact_products
@pytest.mark.parametrize("tokens", [1, BYTES_FROM - 1, BYTES_FROM, 130])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_product_is_the_reference_s(group, tokens, generator):
    packed = random_packed(48, 384, group, bias=True, activations="int8")
    x = torch.randn(tokens, 384, generator=generator).bfloat16()
    if tokens > 1:
        x[0] = 0
    found = cpu_int8.rotated_linear(x, Int8Weights.build(packed), packed.bias.bfloat16(), group)
    assert found.dtype == torch.bfloat16
    # Few tokens: bfloat16 activations and scales. More: weights are rounded to 8 bits.
    check_rounded(found, [packed], x, 1e-2)


@needs_exact_products
@pytest.mark.parametrize("tokens", [BYTES_FROM - 1, BYTES_FROM, 40])
def test_scales_whose_zero_points_fp16_cannot_hold(tokens, generator):
    packed = random_packed(32, 128, 64, activations="int8")
    packed = packed.with_tensors(scales=(packed["scales"].float() * 1e6).half())
    assert packed["scales"].max() > cpu.LARGE_SCALE
    x = torch.randn(tokens, 128, generator=generator).bfloat16()
    check_rounded(cpu_int8.rotated_linear(x, Int8Weights.build(packed), None, 64), [packed], x, 1e-2)


@needs_exact_products
@pytest.mark.parametrize("tokens", [BYTES_FROM - 1, BYTES_FROM, 40])
def test_groups_that_one_scale_for_each_row_does_not_suffice_for(tokens, generator):
    packed = with_uneven_groups(random_packed(48, 384, 64, activations="int8"))
    weights, x = Int8Weights.build(packed), torch.randn(tokens, 384, generator=generator).bfloat16()
    assert not weights.suffice
    check_rounded(cpu_int8.rotated_linear(x, weights, None, 64), [packed], x, 1e-2)


@needs_exact_products
def test_rows_do_not_depend_on_the_rows_beside_them(generator):
    packed = random_packed(32, 128, 64, activations="int8")
    weights, x = Int8Weights.build(packed), torch.randn(40, 128, generator=generator).bfloat16()
    alone = cpu_int8.rotated_linear(x[:20], weights, None, 64)
    assert torch.equal(cpu_int8.rotated_linear(x, weights, None, 64)[:20], alone)


def test_its_tensors_are_read_again():
    weights = Int8Weights.build(random_packed(32, 128, 64, activations="int8"))
    for tensor, again in zip(weights.tensors(), Int8Weights.of_tensors(weights.tensors()).tensors(), strict=True):
        assert torch.equal(tensor, again)


def test_products_are_called_exact_if_they_are():
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(-127, 128, shape, generator=generator) for shape in ((40, 512), (512, 96)))
    exact = torch.equal(torch._int_mm(rows.to(torch.int8), columns.to(torch.int8)).long(), rows @ columns)
    assert exact or not products_are_exact()
