"""One linear layer's whole story: encode, decode, forward, and the transform between."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from pairquant.core.linear import Transform, decode, encode, forward, rotated_weight, transform_of
from pairquant.core.packing import unpack
from pairquant.core.pairs import random_rank, select_pairs
from pairquant.core.rotation import rotation_matrix
from pairquant.core.rounding import proxy_error
from pairquant.spec.linear import PackedLinear, Spec
from pairquant.spec.recipe import Recipe

N, C = 64, 256
# Spelled out, so that these tests hold whatever the presets become.
NEAREST = Recipe(rounding="nearest", shrinks=(1.0,), sweeps=0)
GPTQ = Recipe(rounding="gptq", by_activation=False, shrinks=(1.0,), sweeps=0)
RECIPES = {
    "nearest": NEAREST,
    "gptq": GPTQ,
    "by activation": replace(GPTQ, by_activation=True),
    "everything": replace(GPTQ, by_activation=True, shrinks=(1.0, 0.9), sweeps=2),
}


def draw_transform(generator, k=8, g=128, channels=C) -> Transform:
    """Random angles, pairs, and channel scales between 1/2 and 2."""
    pairs = select_pairs(random_rank(channels // g, g, generator), k).pairs
    theta = (torch.rand(k, channels // 2, generator=generator) - 0.5) * 2 * math.pi
    inverse_scales = torch.exp2(2 * torch.rand(channels, generator=generator) - 1)
    return Transform.build(theta, pairs, inverse_scales, g)


def draw_hessian(generator) -> torch.Tensor:
    x = torch.randn(2 * C, 16, generator=generator) @ torch.randn(16, C, generator=generator)
    x += torch.randn(2 * C, C, generator=generator)
    return x.T @ x


def draw_packed(generator, bits=4, g=128, k=8, recipe=NEAREST, symmetric=False, bias=False):
    """(weight, hessian, transform, packed)."""
    weight, hessian = torch.randn(N, C, generator=generator), draw_hessian(generator)
    transform = draw_transform(generator, k, g)
    layout = Spec(bits, g, k, symmetric).layout(C, N, bias)
    offset = torch.randn(N, generator=generator) if bias else None
    return weight, hessian, transform, encode(weight, transform, hessian, layout, recipe, offset)


def relative(approximation, exact) -> float:
    return ((approximation - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize(
    ("bits", "g", "k", "bias"), [(4, 128, 8, False), (4, 32, 0, True), (3, 64, 3, False), (2, 32, 16, True)]
)
def test_encoded_tensors_obey_the_layout(bits, g, k, bias, recipe, generator):
    _, _, _, packed = draw_packed(generator, bits, g, k, recipe, bias=bias)
    stored = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.tensors.items()}
    assert stored == {name: (field.dtype, field.shape) for name, field in packed.layout.fields().items()}
    assert all(tensor.is_contiguous() for tensor in packed.tensors.values())
    PackedLinear.from_tensors("linear", packed.layout, packed.tensors)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("g", [32, 64, 128])
def test_eight_bits_are_close(g, symmetric, generator):
    weight, _, _, packed = draw_packed(generator, bits=8, g=g, symmetric=symmetric)
    # A step is about 6 σ / 255, and a rounding error of step / √12 is 0.7 % of σ; uneven channel scales add to it.
    assert relative(decode(packed), weight) < 0.015


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_more_bits_are_closer(recipe, generator):
    errors = []
    for bits in (2, 3, 4, 8):
        weight, hessian, _, packed = draw_packed(generator.manual_seed(0), bits=bits, recipe=recipe)
        errors.append(proxy_error(weight, decode(packed), hessian))
    assert all(finer < 0.5 * coarser for coarser, finer in itertools.pairwise(errors))


def test_better_recipes_have_lower_proxy_errors(generator):
    errors = {}
    for name in ("nearest", "gptq", "everything"):
        weight, hessian, _, packed = draw_packed(generator.manual_seed(0), recipe=RECIPES[name])
        errors[name] = proxy_error(weight, decode(packed), hessian)
    assert errors["everything"] < errors["gptq"] < errors["nearest"]


def test_nearest_needs_no_hessian(generator):
    weight, transform = torch.randn(N, C, generator=generator), draw_transform(generator)
    packed = encode(weight, transform, None, Spec(4, 128, 8).layout(C, N), NEAREST)
    assert relative(decode(packed), weight) < 0.15


def test_symmetric_zero_points_lie_in_the_middle(generator):
    _, _, _, packed = draw_packed(generator, symmetric=True)
    assert (unpack(packed["qzeros"], 4) == 8).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_encoding_what_was_decoded_gives_the_same_codes(bits, symmetric, generator):
    _, _, transform, packed = draw_packed(generator, bits=bits, symmetric=symmetric)
    again = encode(decode(packed), transform, None, packed.layout, NEAREST)
    codes, codes_again = (unpack(p["qweight"], bits).T.reshape(N, -1, 128) for p in (packed, again))
    # The grid comes back where a group's codes reach the ends that it was laid out by; else its step is another one.
    top = 2**bits - 1
    if symmetric:
        stays = (codes.amin(-1) == 1) | (codes.amax(-1) == top)
    else:
        stays = (codes.amin(-1) == 0) & (codes.amax(-1) == top)
    assert stays.float().mean() > 0.9
    assert torch.equal(codes[stays], codes_again[stays])
    torch.testing.assert_close(again["scales"].T[stays], packed["scales"].T[stays], rtol=1e-3, atol=0)  # one fp16 step


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("bits", "g", "k"), [(4, 128, 8), (4, 32, 0), (3, 64, 1), (8, 128, 16)])
def test_forward_is_the_product_with_the_decoded_weight(bits, g, k, bias, generator):
    packed = draw_packed(generator, bits, g, k, bias=bias)[-1]
    x = torch.randn(2, 5, C, generator=generator)
    expected = x @ decode(packed).T + (packed.bias.float() if bias else 0)
    # Eight rotations and a sum of 256 products, in float32, of outputs near 16: 4e-5 was seen.
    torch.testing.assert_close(forward(packed, x), expected, rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_forward_computes_in_float32(dtype, generator):
    packed = draw_packed(generator)[-1]
    x = torch.randn(3, C, generator=generator).to(dtype)
    assert torch.equal(forward(packed, x), forward(packed, x.float()))
    assert forward(packed, x).dtype == torch.float32


def test_decode_reads_the_stored_weight_in_its_own_basis(generator):
    _, _, transform, packed = draw_packed(generator)
    torch.testing.assert_close(transform.weight_in(decode(packed)), rotated_weight(packed), rtol=0, atol=1e-5)


def test_bfloat16_weights_are_encoded_as_their_values(generator):
    weight, transform = torch.randn(N, C, generator=generator).bfloat16(), draw_transform(generator)
    packed, expected = (
        encode(w, transform, None, Spec(4, 128, 8).layout(C, N), NEAREST) for w in (weight, weight.float())
    )
    assert torch.equal(packed["qweight"], expected["qweight"])


@pytest.mark.parametrize("k", [0, 1, 8, 16])
def test_weight_out_undoes_weight_in(k, generator):
    transform = draw_transform(generator, k)
    w = torch.randn(N, C, generator=generator)
    torch.testing.assert_close(transform.weight_out(transform.weight_in(w)), w, rtol=0, atol=1e-5)
    torch.testing.assert_close(transform.weight_in(transform.weight_out(w)), w, rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [0, 1, 8, 16])
def test_the_transform_cancels_between_activations_and_weight(k, generator):
    transform = draw_transform(generator, k)
    # In float64, with the matrix built from the same stored angles in float64: exact but for rounding.
    matrix = rotation_matrix(transform.theta.double(), transform.pairs, 128)
    exact = Transform(transform.theta, transform.pairs, transform.inverse_scales.double(), matrix)
    w, x = (torch.randn(rows, C, generator=generator, dtype=torch.float64) for rows in (N, 5))
    x_rot = x * exact.inverse_scales @ torch.block_diag(*matrix)
    torch.testing.assert_close(x_rot @ exact.weight_in(w).T, x @ w.T, rtol=0, atol=1e-11)


def test_hessian_in_is_the_hessian_of_the_transformed_activations(generator):
    transform = draw_transform(generator)
    x = torch.randn(300, C, generator=generator)
    x_rot = x * transform.inverse_scales @ torch.block_diag(*transform.matrix)
    found = transform.hessian_in(x.T @ x)
    assert relative(found, x_rot.T @ x_rot) < 1e-5
    assert relative(found.T, found) < 1e-6


def test_the_proxy_error_is_the_same_in_both_bases(generator):
    weight, hessian, transform, packed = draw_packed(generator)
    rotated = proxy_error(transform.weight_in(weight), rotated_weight(packed), transform.hessian_in(hessian))
    assert rotated == pytest.approx(proxy_error(weight, decode(packed), hessian), rel=1e-3)


def test_the_transform_read_back_is_the_one_encoded_with(generator):
    _, _, transform, packed = draw_packed(generator)
    read = transform_of(packed)
    for name in ("theta", "pairs", "inverse_scales", "matrix"):
        assert torch.equal(getattr(read, name), getattr(transform, name))


def test_a_transform_holds_what_fp16_stores(generator):
    transform = draw_transform(generator)
    for values in (transform.theta, transform.inverse_scales):
        assert torch.equal(values, values.half().float())


@pytest.mark.parametrize("k", [0, 4])
def test_the_identity_changes_nothing(k, generator):
    w = torch.randn(N, C, generator=generator)
    transform = Transform.identity(C, 64, k)
    assert torch.equal(transform.weight_in(w), w)
    packed = encode(w, transform, None, Spec(8, 64, k).layout(C, N), NEAREST)
    PackedLinear.from_tensors("linear", packed.layout, packed.tensors)
    assert relative(decode(packed), w) < 0.015
