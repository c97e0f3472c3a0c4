"""Sites: every kind of weight is read and put back as [N, C], and layers that compute something of their own are none."""

import pytest
import torch
from families import FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from pairquant.layers.linear import RotatedLinear
from pairquant.models.sites import held_by_parameters, is_linear, site_of, sites_in
from pairquant.spec.fields import Size
from pairquant.spec.linear import Spec

KINDS = [nn.Linear(6, 4), nn.Linear(6, 4, bias=False), Conv1D(4, 6)]


@pytest.mark.parametrize("module", KINDS, ids=str)
def test_a_weight_is_seen_as_rows_of_channels(module):
    site = site_of("a.b", module)
    x = torch.randn(3, 6)
    assert site.size == Size(6, 4, getattr(module, "bias", None) is not None)
    expected = x @ site.weight.T + (0 if site.bias is None else site.bias)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("module", KINDS, ids=str)
def test_a_weight_that_was_put_is_the_one_that_runs_in_the_modules_dtype(module):
    site = site_of("a.b", module.to(torch.float64))
    weight = torch.randn(4, 6)
    site.put(weight)
    assert site.dtype == torch.float64
    assert torch.equal(site.weight, weight.double())
    assert torch.equal(site.as_held(site.as_held(weight)), weight)


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x).softmax(-1)


def test_a_linear_that_computes_something_else_is_no_site():
    assert site_of("a", Router(4, 4)) is None
    assert is_linear(Router(4, 4))
    assert site_of("a", nn.Embedding(4, 4)) is None
    assert not is_linear(nn.LayerNorm(4))


def test_sites_are_found_with_their_paths():
    module = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4), Router(4, 4)), "attn": Conv1D(4, 4)})
    assert [site.path for site in sites_in(module, "layers.0")] == ["layers.0.mlp.0", "layers.0.attn"]
    assert [site.path for site in sites_in(nn.Linear(2, 2), "head")] == ["head"]


@pytest.mark.parametrize("module", KINDS, ids=str)
def test_what_runs_in_its_place_has_its_size_and_dtype(module):
    site = site_of("a", module.to(torch.bfloat16))
    packed = site.packed_module(Spec(4, 32, 0).layout(32, 8))
    assert isinstance(packed, RotatedLinear)
    assert packed.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "family", ["Mixtral", "gpt-oss", "Nemotron-H"]
)  # joined, interleaved and transposed, without gates
def test_weights_are_joined_into_what_their_parameters_hold(family):
    model = AutoModelForCausalLM.from_config(FAMILIES[family].build())
    sites = {site.path: site for site in sites_in(model)}
    for site in sites.values():
        site.put(torch.randn(site.size.out_features, site.size.in_features))
    weights = {path: site.weight.clone().requires_grad_() for path, site in reversed(sites.items())}
    held = held_by_parameters(sites, weights)
    assert {site.parameter for site in sites.values()} == set(held)
    for name, value in held.items():
        assert torch.equal(value, model.get_parameter(name))
    sum(value.square().sum() for value in held.values()).backward()
    assert all(torch.equal(weight.grad, 2 * weight.detach()) for weight in weights.values())
