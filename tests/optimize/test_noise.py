"""What rounding activations adds to the loss of a transform, and the weights that answer rounded inputs."""

import pytest
import torch
from packed import error

from pairquant.core.activations import noise, rounded
from pairquant.core.linear import Transform
from pairquant.optimize.noise import InputNoise, RoundedMoments, RoundedSum
from pairquant.optimize.search import Problem, fit_transforms
from pairquant.spec.activations import FORMATS
from pairquant.spec.linear import Spec
from pairquant.spec.options import QuantConfig
from pairquant.spec.recipe import Recipe

G = 32


def inputs(tokens=256, channels=64):
    """Activations with a few channels that are much larger than the others."""
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(0))
    x[:, ::13] *= 8
    return x


@pytest.mark.parametrize("activations", FORMATS)
def test_the_loss_is_the_squared_change_of_the_output_group_by_group(activations):
    x, weight = inputs(), torch.randn(48, 64)
    spec = Spec(4, G, 1, activations=activations)
    into = torch.linalg.qr(torch.randn(2, G, G))[0] * (torch.rand(2, G, 1) + 0.5)
    out_of = torch.linalg.inv(into)
    loss, *_ = InputNoise.of(weight, x, 1000, spec).loss_and_gradients(into, out_of)
    x_rot = (x.view(-1, 2, G).transpose(0, 1) @ out_of.mT).transpose(0, 1).flatten(1)
    turned = (weight.view(-1, 2, G).transpose(0, 1) @ into).transpose(0, 1).flatten(1)
    change = rounded(x_rot, activations, G) - x_rot
    parts = [change[:, part] @ turned[:, part].T for part in (slice(0, G), slice(G, None))]
    expected = sum(part.square().sum() for part in parts) * 1000 / len(x)
    # `into` is not orthogonal here, so the two matrices need not belong together for this.
    assert torch.allclose(loss, expected, rtol=1e-4)


@pytest.mark.parametrize("activations", FORMATS)
def test_no_tokens_and_no_rows_add_nothing(activations):
    """A process may have no token of an expert, and no row of a small weight."""
    eye, spec = torch.eye(G).repeat(2, 1, 1), Spec(4, G, 1, activations=activations)
    for x, weight in ((inputs()[:0], torch.randn(16, 64)), (inputs(), torch.randn(0, 64))):
        found = InputNoise.of(weight, x, 100, spec).loss_and_gradients(eye, eye)
        assert [tensor.abs().sum() for tensor in found] == [0, 0, 0]


@pytest.mark.parametrize("activations", FORMATS)
def test_errors_of_activations_grow_with_what_is_rounded(activations):
    x = inputs(8).requires_grad_()
    found = noise(x, activations, G)
    assert torch.allclose(found, rounded(x.detach(), activations, G) - x.detach(), atol=1e-6)
    (grad,) = torch.autograd.grad(found.square().sum(), x)
    # The errors are a homogeneous function of x, so that its gradient along x is twice its value (Euler).
    assert torch.allclose((grad * x).sum(), 2 * found.square().sum(), rtol=1e-4)


def test_the_gradient_is_that_of_the_loss_for_steps_that_are_proportional():
    x, weight = inputs(), torch.randn(16, 64)
    problem = InputNoise.of(weight, x, len(x), Spec(4, G, 1, activations="int4"))
    eye = torch.eye(G).repeat(2, 1, 1)
    loss, _, grad_out_of = problem.loss_and_gradients(eye, eye)
    larger, *_ = problem.loss_and_gradients(eye, 1.001 * eye, slopes=False)
    assert torch.allclose((grad_out_of * eye).sum() * 0.001, larger - loss, rtol=1e-2)


def test_a_transform_that_knows_of_rounded_activations_is_better_for_them():
    x, weight = inputs(512), torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * 0.1
    spec, config = Spec(8, G, 8, activations="int4"), QuantConfig(group_size=G, recipe=Recipe(steps=40))

    def lost(transform: Transform) -> float:
        x_rot = x * transform.inverse_scales
        x_rot = (x_rot.view(-1, 2, G).transpose(0, 1) @ transform.matrix).transpose(0, 1).flatten(1)
        return error(rounded(x_rot, "int4", G) @ transform.weight_in(weight).T, x @ weight.T)

    plain, knowing = (
        fit_transforms([Problem(weight, x.T @ x, 0, spec, noise)], config)[0]
        for noise in (None, InputNoise.of(weight, x[::2], len(x), spec))
    )
    assert lost(knowing) < 0.95 * lost(plain)


def test_the_target_answers_rounded_inputs_best():
    x, weight = inputs(2000), torch.randn(8, 64)
    q = rounded(x, "int4", G)
    total = RoundedSum()
    for part in (slice(0, 700), slice(700, None)):
        total.add("a", x[part], q[part])
    moments = total.total["a"]
    whole = RoundedMoments(q.T @ q, x.T @ q)
    assert torch.allclose(moments.hessian, whole.hessian, rtol=1e-3, atol=1e-2)
    assert torch.allclose(moments.cross, whole.cross, rtol=1e-3, atol=1e-2)
    wanted = x @ weight.T
    assert error(q @ moments.target(weight).T, wanted) < error(q @ weight.T, wanted)
