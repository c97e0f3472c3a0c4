"""The kernels that build R and the gradient of its angles, against core: on the GPU if there is one, else interpreted."""

import pytest
import torch

pytest.importorskip("triton")

from pairquant.core.pairs import random_rank, select_pairs
from pairquant.core.rotation import rotation_matrix
from pairquant.kernels.fit.matrices import BuildMatrices, Matrices, Plan, build
from pairquant.support.errors import KernelError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw(groups, g, rotations, generator):
    """Pairs as they are fitted, and angles."""
    pairs = select_pairs(random_rank(groups, g, generator), rotations).pairs
    theta = 2 * torch.randn(rotations, groups * g // 2, generator=generator)
    return pairs.to(DEVICE), theta.to(DEVICE)


@pytest.mark.parametrize(("groups", "g", "rotations"), [(1, 128, 8), (3, 64, 1), (2, 32, 16), (5, 32, 3)])
def test_matrices_and_their_gradient(groups, g, rotations, generator):
    pairs, theta = draw(groups, g, rotations, generator)
    upstream = torch.randn(groups, g, g, generator=generator).to(DEVICE)
    exact = theta.double().requires_grad_()
    expected = rotation_matrix(exact, pairs, g)
    expected.backward(upstream.double())
    theta.requires_grad_()
    found = BuildMatrices.apply(theta, Plan.build(pairs, g))
    found.backward(upstream)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(theta.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_the_same_every_time(generator):
    pairs, theta = draw(2, 64, 8, generator)
    plan, grads = Plan.build(pairs, 64), []
    for _ in range(2):
        leaf = theta.clone().requires_grad_()
        (BuildMatrices.apply(leaf, plan) ** 3).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_no_rotation_is_the_identity_and_angles_in_other_precisions_stay_in_them():
    none = Matrices(torch.zeros(0, 64, dtype=torch.int16, device=DEVICE), 64)(torch.zeros(0, 32, device=DEVICE))
    assert torch.equal(none, torch.eye(64, device=DEVICE)[None])
    pairs = torch.arange(64, dtype=torch.int16, device=DEVICE)[None]
    assert Matrices(pairs, 64)(torch.ones(1, 32, dtype=torch.float64, device=DEVICE)).dtype == torch.float64


def test_angles_that_are_not_contiguous(generator):
    pairs, theta = draw(2, 32, 4, generator)
    wide = torch.randn(4, 64, generator=generator).to(DEVICE)
    wide[:, ::2] = theta
    plan = Plan.build(pairs, 32)
    assert torch.equal(build(wide[:, ::2], plan), build(theta, plan))


def test_another_group_size_is_refused():
    with pytest.raises(KernelError, match="group size is 16, allowed: 32, 64, 128"):
        Plan.build(torch.arange(16)[None], 16)
