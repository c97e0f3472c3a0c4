"""Pairwise rotations: step by step, undone, and as one dense matrix for each group."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from pairquant.core.pairs import random_rank, select_pairs
from pairquant.core.rotation import givens_positions, rotate, rotate_dense, rotation_matrix, unrotate

ROTATIONS = range(17)
#: Float64 rounding through 16 rotations of order-one numbers stays far below this; any algebra mistake far above.
EXACT = {"rtol": 0, "atol": 1e-12}


def draw(k: int, g: int, groups: int, generator: torch.Generator, dtype=torch.float64):
    """Angles [K, C/2] around the circle and pairs [K, C]."""
    pairs = select_pairs(random_rank(groups, g, generator), k).pairs
    theta = (torch.rand(k, groups * g // 2, generator=generator, dtype=dtype) - 0.5) * 2 * math.pi
    return theta, pairs


def explicit_matrix(theta: torch.Tensor, pairs: torch.Tensor, g: int) -> torch.Tensor:
    """R [C, C] multiplied up from one matrix for each Givens rotation, as method.md states them."""
    channels = pairs.shape[1]
    product = torch.eye(channels, dtype=theta.dtype)
    for k in range(len(theta)):
        for entry, angle in enumerate(theta[k].tolist()):
            start = 2 * entry // g * g
            i, j = (start + pairs[k, 2 * entry + side].item() for side in (0, 1))
            givens = torch.eye(channels, dtype=theta.dtype)
            givens[i, i] = givens[j, j] = math.cos(angle)
            givens[j, i], givens[i, j] = math.sin(angle), -math.sin(angle)
            product = product @ givens
    return product


@pytest.mark.parametrize("k", ROTATIONS)
def test_unrotate_undoes_rotate(k, generator):
    theta, pairs = draw(k, 32, 3, generator)
    x = torch.randn(5, 96, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(unrotate(rotate(x, theta, pairs, 32), theta, pairs, 32), x, **EXACT)
    torch.testing.assert_close(rotate(unrotate(x, theta, pairs, 32), theta, pairs, 32), x, **EXACT)


@pytest.mark.parametrize("k", ROTATIONS)
def test_the_matrix_is_orthogonal(k, generator):
    matrix = rotation_matrix(*draw(k, 32, 3, generator), 32)
    assert matrix.shape == (3, 32, 32)
    identity = torch.eye(32, dtype=torch.float64).expand(3, 32, 32)
    torch.testing.assert_close(matrix @ matrix.mT, identity, **EXACT)


@pytest.mark.parametrize("k", ROTATIONS)
def test_rotate_equals_the_dense_product(k, generator):
    theta, pairs = draw(k, 32, 3, generator)
    x = torch.randn(5, 96, generator=generator, dtype=torch.float64)
    matrix = rotation_matrix(theta, pairs, 32)
    dense = torch.block_diag(*matrix)
    torch.testing.assert_close(rotate(x, theta, pairs, 32), x @ dense, **EXACT)
    torch.testing.assert_close(unrotate(x, theta, pairs, 32), x @ dense.T, **EXACT)
    torch.testing.assert_close(rotate_dense(x, matrix), x @ dense, **EXACT)
    torch.testing.assert_close(rotate_dense(x, matrix.mT), x @ dense.T, **EXACT)


@pytest.mark.parametrize("k", [0, 1, 2, 3, 5, 8])
def test_the_matrix_is_the_product_of_its_givens_rotations_in_order(k, generator):
    theta, pairs = draw(k, 8, 2, generator)
    built = torch.block_diag(*rotation_matrix(theta, pairs, 8))
    torch.testing.assert_close(built, explicit_matrix(theta, pairs, 8), **EXACT)


@pytest.mark.parametrize("g", [32, 64, 128])
def test_group_sizes(g, generator):
    theta, pairs = draw(8, g, 2, generator)
    x = torch.randn(3, 2 * g, generator=generator, dtype=torch.float64)
    expected = x @ torch.block_diag(*rotation_matrix(theta, pairs, g))
    torch.testing.assert_close(rotate(x, theta, pairs, g), expected, **EXACT)


@pytest.mark.parametrize(
    ("pair", "x", "expected"),
    [  # y_i = cos t · x_i + sin t · x_j,  y_j = cos t · x_j - sin t · x_i,  with t = 30°
        ((0, 1), (1.0, 0.0), (math.sqrt(3) / 2, -0.5)),
        ((0, 1), (0.0, 1.0), (0.5, math.sqrt(3) / 2)),
        ((1, 0), (1.0, 0.0), (math.sqrt(3) / 2, 0.5)),
        ((1, 0), (0.0, 1.0), (-0.5, math.sqrt(3) / 2)),
    ],
)
def test_two_channels_by_hand(pair, x, expected):
    theta = torch.tensor([[math.pi / 6]], dtype=torch.float64)
    pairs = torch.tensor([pair], dtype=torch.int16)
    x, expected = torch.tensor([x], dtype=torch.float64), torch.tensor([expected], dtype=torch.float64)
    torch.testing.assert_close(rotate(x, theta, pairs, 2), expected, **EXACT)
    torch.testing.assert_close(x @ rotation_matrix(theta, pairs, 2)[0], expected, **EXACT)


def test_rotations_of_one_pair_add_their_angles():
    pairs = torch.tensor([[0, 1]] * 3, dtype=torch.int16)
    theta = torch.tensor([[0.2], [0.3], [-1.1]], dtype=torch.float64)
    expected = rotation_matrix(torch.tensor([[-0.6]], dtype=torch.float64), pairs[:1], 2)
    torch.testing.assert_close(rotation_matrix(theta, pairs, 2), expected, **EXACT)


def test_zero_angles_change_nothing(generator):
    theta, pairs = draw(8, 32, 2, generator)
    x = torch.randn(3, 64, generator=generator)
    assert torch.equal(rotate(x, torch.zeros_like(theta), pairs, 32), x)


def test_rotation_keeps_the_length_of_each_group(generator):
    theta, pairs = draw(8, 32, 2, generator)
    x = torch.randn(4, 64, generator=generator, dtype=torch.float64)
    lengths = rotate(x, theta, pairs, 32).view(4, 2, 32).norm(dim=-1)
    torch.testing.assert_close(lengths, x.view(4, 2, 32).norm(dim=-1), **EXACT)


def test_groups_do_not_mix(generator):
    theta, pairs = draw(8, 32, 3, generator)
    x = torch.randn(4, 96, generator=generator, dtype=torch.float64)
    changed = x.clone()
    changed[:, 32:64] += 1
    difference = rotate(changed, theta, pairs, 32) - rotate(x, theta, pairs, 32)
    assert (difference[:, :32] == 0).all()
    assert (difference[:, 64:] == 0).all()


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (0, 64)])
def test_leading_dimensions_are_free(shape, generator):
    theta, pairs = draw(4, 32, 2, generator)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    matrix = rotation_matrix(theta, pairs, 32)
    expected = x @ torch.block_diag(*matrix)
    torch.testing.assert_close(rotate(x, theta, pairs, 32), expected, **EXACT)
    torch.testing.assert_close(rotate_dense(x, matrix), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rotate_answers_in_the_dtype_of_its_input(dtype, generator):
    theta, pairs = draw(8, 32, 2, generator, torch.float32)
    x = torch.randn(3, 64, generator=generator).to(dtype)
    y = rotate(x, theta, pairs, 32)
    assert y.dtype == dtype
    exact = rotate(x.double(), theta.double(), pairs, 32)
    # Eight rotations, each rounding twice in an input of at most about 4: 8 · 2 · 4 half-ulps.
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=64 * torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_pairs_may_be_any_integers(dtype, generator):
    theta, pairs = draw(3, 32, 2, generator)
    x = torch.randn(3, 64, generator=generator, dtype=torch.float64)
    assert torch.equal(rotate(x, theta, pairs.to(dtype), 32), rotate(x, theta, pairs, 32))
    assert torch.equal(rotation_matrix(theta, pairs.to(dtype), 32), rotation_matrix(theta, pairs, 32))


def test_a_part_of_the_groups_may_be_cut_out_along_the_channels(generator):
    theta, pairs = draw(3, 32, 4, generator)
    part = rotation_matrix(theta[:, 32:48], pairs[:, 64:96], 32)
    assert torch.equal(part, rotation_matrix(theta, pairs, 32)[2:3])
    part = rotation_matrix(theta[:, 32:48], pairs.long()[:, 64:96], 32)
    assert torch.equal(part, rotation_matrix(theta, pairs, 32)[2:3])


def test_positions_given_beforehand_change_nothing(generator):
    theta, pairs = draw(5, 32, 2, generator)
    with_positions = rotation_matrix(theta, pairs, 32, givens_positions(pairs, 32))
    assert torch.equal(with_positions, rotation_matrix(theta, pairs, 32))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_gradient_of_the_matrix_in_the_angles(k, generator):
    theta, pairs = draw(k, 4, 2, generator)
    assert gradcheck(lambda t: rotation_matrix(t, pairs, 4), theta.requires_grad_())


@pytest.mark.parametrize("function", [rotate, unrotate])
@pytest.mark.parametrize("k", [1, 3])
def test_gradient_of_rotating_in_angles_and_input(function, k, generator):
    theta, pairs = draw(k, 4, 2, generator)
    x = torch.randn(2, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda v, t: function(v, t, pairs, 4), (x, theta.requires_grad_()))


def test_gradient_of_the_dense_product(generator):
    x = torch.randn(2, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert gradcheck(rotate_dense, (x, matrix))
