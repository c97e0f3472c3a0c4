"""Whether one scale for each row suffices, as the error of the output tells."""

import pytest
import torch
from packed import error, random_packed

from pairquant.core.activations import rounded
from pairquant.core.linear import rotated_weight
from pairquant.kernels.run import row_scales

FORMATS = ("int8", "fp8")


def even(rows=64, channels=512, **options):
    """A linear whose groups have about the same scales."""
    packed = random_packed(rows, channels, 64, activations="int8", **options)
    return packed.with_tensors(scales=(0.01 + packed["scales"].float() / 10).half())


def with_a_large_group(factor, which=slice(None), **options):
    """The first group of these rows has scales that are so many times as large."""
    packed = even(**options)
    scales = packed["scales"].clone()
    scales[0, which] *= factor
    return packed.with_tensors(scales=scales)


@pytest.mark.parametrize("activations", FORMATS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_groups_of_like_scales_may_share_one(bits, activations):
    assert row_scales.suffice(even(bits=bits), activations)


def test_a_row_with_one_far_larger_group_keeps_a_scale_for_each():
    assert row_scales.error(with_a_large_group(50), "int8") > 0.1
    assert not row_scales.suffice(with_a_large_group(50), "int8")


def test_steps_of_fp8_shrink_with_the_weight():
    assert row_scales.suffice(with_a_large_group(50), "fp8")
    assert not row_scales.suffice(with_a_large_group(1e6), "fp8")


@pytest.mark.parametrize("activations", FORMATS)
@pytest.mark.parametrize("factor", [1, 8, 50])
def test_the_error_is_that_of_outputs_to_which_all_groups_contribute_equally(factor, activations):
    packed = with_a_large_group(factor)
    weight = rotated_weight(packed)
    x = torch.randn(4000, 512, generator=torch.Generator().manual_seed(0))
    x[:, :64] /= factor
    found = error(x @ rounded(weight, activations, 64).T, x @ weight.T)
    assert found == pytest.approx(row_scales.error(packed, activations), rel=0.15)


@pytest.mark.parametrize("rows", [2048, 2056])
def test_many_rows_are_judged_by_some_of_them(rows):
    assert row_scales.suffice(even(rows, 128), "int8")
    assert not row_scales.suffice(with_a_large_group(50, slice(rows // 2, None), rows=rows, channels=128), "int8")


def test_a_group_of_zeros_has_no_error():
    packed = even()
    zeros = packed.with_tensors(qweight=torch.zeros_like(packed["qweight"]), qzeros=torch.zeros_like(packed["qzeros"]))
    assert row_scales.error(zeros, "int8") == 0
