"""Stages of block-wise training: the learned quantizer's gradients, and transforms that lie side by side."""

import pytest
import torch
from packed import random_packed

from pairquant.core.grid import dequantize, quantize
from pairquant.core.linear import transform_of
from pairquant.optimize.stages import BlockTransforms, LearnedQuantize, straight_through


def test_learned_quantizer_agrees_with_the_plain_one(generator):
    w = torch.randn(6, 64, generator=generator)
    scale, zero = torch.full((6, 2), 0.2), torch.full((6, 2), 3.0)
    ours = LearnedQuantize.apply(w, scale, zero, 3)
    assert torch.equal(ours, dequantize(quantize(w, scale, zero, 3), scale, zero))


def test_learned_quantizer_gradients_are_those_of_straight_through_autograd(generator):
    w = torch.randn(6, 64, generator=generator, requires_grad=True)
    scale = torch.rand(6, 2, generator=generator).add(0.1).requires_grad_()  # clips some weights
    zero = torch.full((6, 2), 3.0, requires_grad=True)
    ratio = w.view(6, 2, 32) / scale[..., None]
    whole = ratio + (ratio.round() - ratio).detach() + zero[..., None]
    expected = ((whole.clamp(0, 7) - zero[..., None]) * scale[..., None]).view(6, 64)
    slope = torch.randn(6, 64, generator=generator)
    ours = LearnedQuantize.apply(w, scale, zero, 3)
    for a, b in zip(
        torch.autograd.grad(ours, (w, scale, zero), slope),
        torch.autograd.grad(expected, (w, scale, zero), slope),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_straight_through_has_the_value_and_the_other_gradient():
    x = torch.tensor([0.4, 1.6], requires_grad=True)
    y = straight_through(x, x.round())
    y.sum().backward()
    assert torch.equal(y.detach(), torch.tensor([0.0, 2.0]))
    assert torch.equal(x.grad, torch.ones(2))


@pytest.mark.parametrize("specs", [[(64, 3), (64, 3)], [(64, 3), (32, 2), (64, 3), (32, 0)]])
def test_stored_transforms_come_back_in_order(specs):
    packed = [random_packed(8, 128, group, rotations, seed) for seed, (group, rotations) in enumerate(specs)]
    transforms = BlockTransforms.stored_in(packed)
    assert len(transforms.sets) == len(set(specs))
    assert len(transforms.angles()) == len({spec for spec in specs if spec[1]})
    for linear, built, (into, out_of) in zip(packed, transforms.build(), transforms.matrices(), strict=True):
        stored = transform_of(linear)
        assert torch.equal(built.pairs, stored.pairs)
        assert torch.equal(built.theta, stored.theta)
        assert torch.equal(built.inverse_scales, stored.inverse_scales)
        identity = torch.eye(linear.layout.group_size).expand_as(into)
        torch.testing.assert_close(into @ out_of, identity, rtol=1e-4, atol=1e-4)
