"""RotatedLinear runs what core says, keeps stored bits whatever dtype the model is cast to."""

import pytest
import torch

from pairquant.core.linear import Transform, encode, forward
from pairquant.layers.linear import RotatedLinear
from pairquant.spec.linear import Spec
from pairquant.spec.recipe import PRESETS


@pytest.fixture
def packed():
    generator = torch.Generator().manual_seed(0)
    layout = Spec(4, 64, 4).layout(128, 64, True)
    transform = Transform.identity(128, 64, rotations=4)
    theta = torch.randn(4, 64, generator=generator)
    transform = Transform.build(theta, transform.pairs, torch.rand(128, generator=generator) + 0.5, 64)
    weight, bias = torch.randn(64, 128, generator=generator), torch.randn(64, generator=generator)
    return encode(weight, transform, None, layout, PRESETS["rtn"], bias=bias)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_forward_equals_the_reference(packed, dtype, tolerance):
    x = torch.randn(3, 5, 128)
    y = RotatedLinear.from_packed(packed)(x.to(dtype))
    assert y.dtype == dtype
    expected = forward(packed, x)
    # Relative to the output's scale: the weight and the input were each rounded to dtype.
    assert (y.float() - expected).norm() / expected.norm() < tolerance


def test_casting_and_moving_keeps_the_stored_bits(packed):
    module = RotatedLinear.from_packed(packed).to(torch.bfloat16).half().double().to("cpu")
    for name, tensor in packed.tensors.items():
        assert torch.equal(module.state_dict()[name], tensor)


def test_state_dict_holds_the_stored_tensors_and_nothing_else(packed):
    module = RotatedLinear.from_packed(packed)
    module(torch.randn(2, 128))  # whatever forward caches must not be saved
    assert set(module.state_dict()) == set(packed.tensors)


def test_a_new_state_dict_is_seen_by_the_next_forward(packed):
    module = RotatedLinear.from_packed(packed)
    x = torch.randn(2, 128)
    expected = 2 * forward(packed, x)  # before loading: the module shares memory with `packed`
    module(x)
    other = {
        **{k: v.clone() for k, v in packed.tensors.items()},
        "scales": packed["scales"] * 2,
        "bias": packed.bias * 2,
    }
    module.load_state_dict(other)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


def test_gradients_flow_to_the_input(packed):
    x = torch.randn(2, 128, requires_grad=True)
    RotatedLinear.from_packed(packed)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
