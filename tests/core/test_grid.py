"""The group-wise affine quantizer and its straight-through gradients."""

import pytest
import torch

from pairquant.core.grid import (
    MIN_SCALE,
    affine_parameters,
    dequantize,
    fake_quantize,
    group_range,
    quantize,
    zero_point,
)

BITS = (2, 3, 4, 8)
SYMMETRIC = pytest.mark.parametrize("symmetric", [False, True])


def quantize_all(w, bits, g, symmetric=False):
    """w → (codes, scale, zero, values)."""
    scale, zero = affine_parameters(*group_range(w, g), bits, symmetric)
    codes = quantize(w, scale, zero, bits)
    return codes, scale, zero, dequantize(codes, scale, zero)


@pytest.mark.parametrize(
    ("bits", "symmetric", "w", "scale", "zero", "codes", "values"),
    [
        (2, False, [-1.0, -0.3, 0.6, 2.0], 1.0, 1, [0, 1, 2, 3], [-1.0, 0.0, 1.0, 2.0]),
        (4, False, [-1.25, 0.3, 1.2, 2.5], 0.25, 5, [0, 6, 10, 15], [-1.25, 0.25, 1.25, 2.5]),
        (3, False, [0.1, 0.9, 2.2, 3.5], 0.5, 0, [0, 2, 4, 7], [0.0, 1.0, 2.0, 3.5]),
        (3, False, [-0.1, -0.9, -2.2, -3.5], 0.5, 7, [7, 5, 3, 0], [0.0, -1.0, -2.0, -3.5]),
        (4, True, [-7.0, 0.4, 3.6, 6.0], 1.0, 8, [1, 8, 12, 14], [-7.0, 0.0, 4.0, 6.0]),
        (2, True, [-2.0, 0.4, 1.2, 1.0], 2.0, 2, [1, 2, 3, 2], [-2.0, 0.0, 2.0, 0.0]),
    ],
)
def test_by_hand(bits, symmetric, w, scale, zero, codes, values):
    found = quantize_all(torch.tensor([w]), bits, 4, symmetric)
    expected = torch.tensor([codes], dtype=torch.uint8), *map(torch.tensor, ([[scale]], [[float(zero)]], [values]))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_zero_point_is_the_code_of_zero():
    low, scale = torch.tensor([[-1.0, 0.0, -3.0]]), torch.tensor([[0.25, 0.25, 0.1]])
    assert zero_point(low, scale, 4).tolist() == [[4, 0, 15]]


@SYMMETRIC
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("g", [32, 64, 128])
def test_error_is_at_most_half_a_step(bits, g, symmetric, generator):
    w = torch.randn(16, 2 * g, generator=generator)
    codes, scale, zero, values = quantize_all(w, bits, g, symmetric)
    assert codes.dtype == torch.uint8
    assert codes.shape == w.shape
    assert scale.shape == zero.shape == (16, 2)
    assert codes.max() <= 2**bits - 1
    error = (values - w).abs().view(16, 2, g)
    # Dividing by the scale and multiplying again costs a few float32 ulps of a weight of at most 5.
    assert (error <= scale[..., None] / 2 + 5e-6).all()


@SYMMETRIC
@pytest.mark.parametrize("bits", BITS)
def test_fake_quantize_is_quantize_then_dequantize(bits, symmetric, generator):
    w = torch.randn(8, 128, generator=generator)
    assert torch.equal(fake_quantize(w, bits, 64, symmetric), quantize_all(w, bits, 64, symmetric)[-1])


def test_groups_and_rows_are_quantized_by_themselves(generator):
    w = torch.randn(4, 128, generator=generator)
    louder = w.clone()
    louder[1, 64:] *= 100
    changed = fake_quantize(louder, 4, 64) != fake_quantize(w, 4, 64)
    assert changed[1, 64:].any()
    assert not changed[1, :64].any()
    assert not changed[[0, 2, 3]].any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.5, -0.5, 1e3, -3e-2])
def test_a_constant_group_comes_back(bits, value):
    w = torch.full((2, 64), value)
    torch.testing.assert_close(fake_quantize(w, bits, 32), w, rtol=1e-6, atol=0)
    torch.testing.assert_close(fake_quantize(w, bits, 32, symmetric=True), w, rtol=1e-6, atol=0)


@SYMMETRIC
@pytest.mark.parametrize("sign", [1, -1])
def test_a_group_of_one_sign_is_not_clipped(sign, symmetric, generator):
    w = sign * (1 + torch.rand(4, 64, generator=generator))
    _, scale, _, values = quantize_all(w, 4, 32, symmetric)
    assert ((values - w).abs().view(4, 2, 32) <= scale[..., None] / 2 + 1e-6).all()


@SYMMETRIC
@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zeros(bits, symmetric):
    codes, scale, zero, values = quantize_all(torch.zeros(2, 64), bits, 32, symmetric)
    assert (values == 0).all()
    assert (scale >= MIN_SCALE).all()
    assert torch.equal(codes.view(2, 2, 32).float(), zero[..., None].expand(2, 2, 32))


@SYMMETRIC
def test_a_zero_among_others_stays_zero(symmetric, generator):
    w = torch.randn(4, 64, generator=generator)
    w[:, 5] = 0
    assert (fake_quantize(w, 4, 32, symmetric)[:, 5] == 0).all()


@SYMMETRIC
def test_tiny_weights_keep_a_usable_scale(symmetric, generator):
    w = torch.randn(4, 64, generator=generator) * 1e-7
    _, scale, _, values = quantize_all(w, 4, 32, symmetric)
    assert (scale >= MIN_SCALE).all()
    assert ((values - w).abs() <= MIN_SCALE / 2).all()


@SYMMETRIC
@pytest.mark.parametrize("bits", BITS)
def test_values_on_the_grid_come_back_exactly(bits, symmetric, generator):
    top, zero = 2**bits - 1, 2 ** (bits - 1)
    steps = torch.randint(-zero + 1 if symmetric else -zero, top - zero + 1, (8, 64), generator=generator)
    steps[:, ::32], steps[:, 1::32] = -zero + symmetric, top - zero  # both ends of each group's grid are taken
    w = steps * 0.125  # a power of two: every product and quotient is exact
    assert torch.equal(fake_quantize(w, bits, 32, symmetric), w)


def straight_through(x, function):
    """function(x) forward, the identity backward."""
    return x + (function(x) - x).detach()


def reference(w, bits, g, symmetric):
    """The quantizer's formulas, rounded and clamped with the detach trick, differentiated by autograd."""
    by_group, top = w.view(len(w), -1, g), 2**bits - 1
    low, high = by_group.amin(-1, keepdim=True).clamp(max=0), by_group.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        half = 2 ** (bits - 1)
        scale, zero = torch.maximum(-low, high) / (half - 1), torch.full_like(low, half)
        scale = scale.clamp(min=MIN_SCALE)
    else:
        scale = ((high - low) / top).clamp(min=MIN_SCALE)
        zero = straight_through(-low / scale, lambda z: z.round().clamp(0, top))
    codes = straight_through(by_group / scale + zero, lambda q: ((by_group / scale).round() + zero).clamp(0, top))
    return ((codes - zero) * scale).view(w.shape)


WEIGHTS = {
    "both signs": lambda w: w,
    "positive": lambda w: w.abs() + 0.1,
    "negative": lambda w: -w.abs() - 0.1,
    "outlier": lambda w: torch.where(torch.arange(w.shape[1]) % 32 == 3, 30 * w, w),
    "below the least scale": lambda w: w * 1e-7,
}


@SYMMETRIC
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_gradients_equal_the_straight_through_reference(kind, bits, symmetric, generator):
    w = WEIGHTS[kind](torch.randn(4, 64, generator=generator, dtype=torch.float64))
    direction = torch.randn(4, 64, generator=generator, dtype=torch.float64)
    ours, theirs = w.clone().requires_grad_(), w.clone().requires_grad_()
    values, expected = fake_quantize(ours, bits, 32, symmetric), reference(theirs, bits, 32, symmetric)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    values.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@SYMMETRIC
def test_tied_extremes_share_one_gradient(symmetric, generator):
    w = torch.rand(2, 32, generator=generator, dtype=torch.float64) - 0.5
    w[:, [4, 9, 20]] = 2.0
    direction = torch.randn(2, 32, generator=generator, dtype=torch.float64)
    ours, theirs = w.clone().requires_grad_(), w.clone().requires_grad_()
    fake_quantize(ours, 4, 32, symmetric).backward(direction)
    reference(theirs, 4, 32, symmetric).backward(direction)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_zeros_pass_the_gradient_on():
    w = torch.zeros(2, 32, requires_grad=True)
    fake_quantize(w, 4, 32).sum().backward()
    assert torch.equal(w.grad, torch.ones(2, 32))


@SYMMETRIC
def test_the_gradient_may_come_back_in_any_memory_order(symmetric, generator):
    w = torch.randn(4, 64, generator=generator, requires_grad=True)
    x = torch.randn(4, 5, generator=generator)
    (fake_quantize(w, 4, 32, symmetric).T @ x).square().sum().backward()
    transposed = w.grad
    w.grad = None
    torch.einsum("nc,nt->ct", fake_quantize(w, 4, 32, symmetric).clone(), x).square().sum().backward()
    torch.testing.assert_close(transposed, w.grad)
