"""Rounding of activations: known values, spans, bounds of the error, gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pairquant.core.activations import groups_int4, mxfp4, rounded, rows_fp8, rows_int8
from pairquant.spec.activations import FORMATS

#: The largest error, as a share of the largest value of the span: half of the widest step, or what saturating cuts off.
WORST = {"int8": 0.5 / 127, "fp8": 16 / 448, "int4": 0.95 * 0.5 / 7, "mxfp4": 0.25}


def test_mxfp4_scales_are_the_powers_of_two_of_the_specification():
    x = torch.zeros(1, 96)
    x[0, 3], x[0, 40], x[0, 64] = 7.99, -4.0, 0.1
    elements, scale = mxfp4(x, 32)
    assert scale.tolist() == [[1.0, 1.0, 2.0**-6]]
    assert elements[0, 3] == 6  # saturated
    assert elements[0, 40] == -4
    assert elements[0, 64] * scale[0, 2] == 0.09375


def test_known_values_of_whole_numbers_and_fp8():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.4], [-254, 1, 3, 200]])
    codes, scale = rows_int8(x)
    assert codes.tolist() == [[127, 0, 2, -2], [-127, 0, 2, 100]]
    assert scale.tolist() == [1, 2]
    codes, scale = rows_fp8(torch.tensor([[448.0, 17.0, 0.0019, -19.0]]))
    assert codes.float().tolist() == [[448, 16, 2.0**-9, -20]]
    codes, scale = groups_int4(torch.tensor([[7.0, 0.45, -14.0, 2.9]]), 2)
    assert codes.tolist() == [[7, 0, -7, 2]]
    assert torch.allclose(scale, torch.tensor([[0.95, 1.9]]))


@pytest.mark.parametrize("activations", FORMATS)
@given(seed=st.integers(0, 1000), exponent=st.integers(-20, 20))
@settings(max_examples=20, deadline=None)
def test_the_error_is_bounded_by_the_largest_value_of_the_span(activations, seed, exponent):
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    width = FORMATS[activations].channels(192, 64)
    found = rounded(x, activations, 64)
    largest = x.unflatten(-1, (-1, width)).abs().amax(-1, keepdim=True)
    error = (found - x).unflatten(-1, (-1, width)).abs()
    assert (error <= largest * (WORST[activations] + 1e-5)).all()


@pytest.mark.parametrize("activations", FORMATS)
def test_spans_do_not_touch_each_other_and_zeros_stay(activations):
    x = torch.randn(4, 128)
    width = FORMATS[activations].channels(128, 64)
    first = rounded(x, activations, 64)
    x[1:] *= 1000
    if width < 128:
        x[:, width:] *= 1000
    again = rounded(x, activations, 64)
    assert torch.equal(first[0, :width], again[0, :width])
    assert torch.equal(rounded(torch.zeros(2, 3, 64), activations, 64), torch.zeros(2, 3, 64))
    assert torch.equal(rounded(x[:0], activations, 64), x[:0])
    tiny = torch.full((1, 64), 1e-38)
    assert rounded(tiny, activations, 64).isfinite().all()


@pytest.mark.parametrize("activations", FORMATS)
def test_the_gradient_passes_unchanged(activations):
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    y = rounded(x, activations, 64)
    weight = torch.randn(3, 64)
    (y * weight).sum().backward()
    assert y.dtype == torch.float32
    assert torch.equal(x.grad, weight.bfloat16())
    assert torch.equal(y.detach(), rounded(x.detach(), activations, 64))
