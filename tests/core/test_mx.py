"""MXFP4 arithmetic: the values of E2M1, their codes, and powers of two."""

import torch

from pairquant.core.mx import e2m1, e2m1_codes, e2m1_values, exp2, exponent, floor_scale, nearest_power

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
CODES = torch.arange(16, dtype=torch.uint8)


def test_e2m1_has_its_sixteen_values_and_rounds_half_to_even():
    grid = torch.cat((-E2M1.flip(0), E2M1))
    assert torch.equal(e2m1(grid), grid)
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert torch.equal(e2m1(halves), torch.tensor([0.0, 1, 1, 2, 2, 4, 4]))
    assert torch.equal(e2m1(torch.tensor([7.9, -100.0])), torch.tensor([6.0, -6.0]))
    x = torch.linspace(-6, 6, 4001)
    assert torch.equal((e2m1(x) - x).abs(), (grid - x[:, None]).abs().amin(1))


def test_every_code_stands_for_its_sign_exponent_and_mantissa():
    for code, value in zip(CODES.tolist(), e2m1_values(CODES).tolist(), strict=True):
        sign, field, mantissa = -1 if code & 8 else 1, (code >> 1) & 3, code & 1
        assert value == sign * (2 ** (field - 1) * (1 + mantissa / 2) if field else mantissa / 2)


def test_values_have_the_codes_that_stand_for_them():
    assert torch.equal(e2m1_codes(e2m1_values(CODES)), torch.where(CODES == 8, 0, CODES))  # zero has no sign
    x = torch.randn(7, 5, 3) * 4
    assert torch.equal(e2m1_values(e2m1_codes(e2m1(x))), e2m1(x))


def test_the_specifications_scale_leaves_the_largest_between_four_and_eight():
    largest = torch.tensor([4.0, 7.99, 8.0, 1.0, 3e38, 1e-45, 0.0])
    assert floor_scale(largest).tolist() == [1, 1, 2, 0.25, 2.0**125, 2.0**-126, 2.0**-126]


def test_powers_of_two_are_exact_and_the_nearest_is_found():
    every = torch.arange(-126, 128, dtype=torch.int32)
    assert torch.equal(exp2(every).double(), 2.0 ** every.double())
    assert torch.equal(exponent(exp2(every) * 1.99), every)
    assert nearest_power(torch.tensor([1.49, 1.51, 2.9, 3.1, -1.0, 0.0, 1e9])).tolist() == [
        1, 2, 2, 4, 2.0**-23, 2.0**-23, 2.0**13,
    ]  # fmt: skip
