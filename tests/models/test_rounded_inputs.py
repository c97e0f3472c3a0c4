"""Blocks with decoded weights that round what they read, against the layers that run the packed ones."""

import copy

import pytest
import torch
from families import FAMILIES
from packed import error
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from pairquant.core.activations import rounded
from pairquant.core.linear import Transform, decode
from pairquant.core.rotation import rotate
from pairquant.layers.linear import RotatedLinear
from pairquant.layers.model import replace_module
from pairquant.models.blocks import find_blocks
from pairquant.models.inputs import recorded_inputs
from pairquant.models.rounded_inputs import (
    InputRounding,
    is_matrix,
    matrices_of,
    round_inputs,
    rounded_inputs,
    roundings_from,
    roundings_of,
)
from pairquant.optimize.walk import quantize_blocks
from pairquant.spec.activations import FORMATS
from pairquant.spec.linear import Spec
from pairquant.spec.options import QuantConfig

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 35)[None] * 7 % 288


@pytest.fixture(scope="module")
def quantized():
    """A tiny model quantized in place, what it was, and its packed linears."""
    model = tiny_model()
    before = copy.deepcopy(model)
    config = QuantConfig(preset="rtn", group_size=64, activations="int8")
    packed = {}
    for result in quantize_blocks(model, None, config, CPU):
        packed |= result.packed
    return model, before, packed


def test_a_model_that_was_quantized_in_place_computes_as_its_packed_layers(quantized):
    model, before, packed = quantized
    running = copy.deepcopy(before)
    for path, linear in packed.items():
        replace_module(running, path, RotatedLinear.from_packed(linear))
    with torch.no_grad():
        found, wanted = model(TOKENS).logits, running(TOKENS).logits
        # A value between two steps may be rounded either way, since the sums of both differ in their order.
        assert error(found, wanted) < 2e-3
        for path, linear in packed.items():
            dense = before.get_submodule(path)
            dense.weight.data = decode(linear)
        assert error(before(TOKENS).logits, wanted) > 2 * error(found, wanted)


@pytest.mark.parametrize("activations", FORMATS)
def test_rounding_in_the_models_basis_is_what_a_packed_layer_reads(activations):
    layout = Spec(4, 64, 3, activations=activations).layout(128, 8)
    pairs = torch.stack([torch.randperm(64) for _ in range(3)]).repeat(1, 2)
    transform = Transform.build(torch.rand(3, 64), pairs, torch.rand(128) + 0.5, 64)
    rounding = InputRounding.of(transform, layout)
    x, weight = torch.randn(5, 128), torch.randn(7, 128)
    x_rot = rotate(x * transform.inverse_scales, transform.theta, transform.pairs, 64)
    wanted = rounded(x_rot, activations, 64) @ transform.weight_in(weight).T
    assert error(rounding(x) @ weight.T, wanted) < 2e-2
    assert InputRounding.of(transform, Spec(4, 64, 3).layout(128, 8)) is None


@pytest.mark.parametrize("activations", FORMATS)
def test_gradients_tell_how_errors_grow_with_what_is_rounded(activations):
    """Twice the input has twice the error, so that the slope of |error|² along the input is 2 |error|²."""
    eye = torch.eye(32).repeat(2, 1, 1)
    rounding = InputRounding(eye, eye, activations, 32)
    x = torch.randn(7, 64, requires_grad=True)
    loss = (rounding(x) - x).square().sum()
    (slope,) = torch.autograd.grad(loss, x)
    with torch.no_grad():
        assert loss.item() == (rounding(x) - x).square().sum().item()
        assert (slope * x).sum().item() == pytest.approx(2 * loss.item(), rel=1e-3)


@pytest.mark.parametrize("family", ["Mixtral", "gpt-oss", "Llama 4 (text)"])
def test_experts_round_what_they_read_and_what_their_last_product_reads(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family].build()).eval()
    block = find_blocks(model)[-1]
    sites = {path: site for path, site in block.sites.items() if site.pool is not None}
    (module,) = {site.module for site in sites.values()}
    layouts = {
        p: Spec(4, 32, 0, activations="int8").layout(s.size.in_features, s.size.out_features) for p, s in sites.items()
    }
    identities = {p: InputRounding.of(Transform.identity(s.size.in_features, 32), layouts[p]) for p, s in sites.items()}
    tokens = torch.randint(3, 200, (1, 24))
    seen = {}
    with torch.no_grad():
        wanted = model(tokens).logits
        with rounded_inputs(sites, identities, lambda path, x, y: seen.update({path: (x, y)})):
            found = model(tokens).logits
        assert 0 < error(found, wanted) < 0.05
        assert torch.equal(model(tokens).logits, wanted)  # the module is as it was
    assert "forward" not in vars(module)
    for path, (x, y) in seen.items():
        assert x.shape[-1] == sites[path].size.in_features
        assert torch.allclose(y, rounded(x, "int8", 32), atol=1e-6)
    assert {path.rpartition(".")[2] for path in seen} == {path.rpartition(".")[2] for path in sites}


@pytest.fixture
def half_rounded():
    """A tiny Mixtral, its tokens, its experts' sites, and by path what rounds the inputs of first and of last products."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES["Mixtral"].build()).eval()
    sites = {path: site for path, site in find_blocks(model)[-1].sites.items() if site.pool is not None}
    roundings = {}
    for path, site in sites.items():
        size = site.size
        layout = Spec(4, 32, 0, activations="int4").layout(size.in_features, size.out_features)
        roundings[path] = InputRounding.of(Transform.identity(size.in_features, 32), layout)
    outer = {path: rounding for path, rounding in roundings.items() if sites[path].part != "down_proj"}
    down = {path: rounding for path, rounding in roundings.items() if path not in outer}
    return model, torch.randint(3, 200, (1, 24)), sites, outer, down


@torch.no_grad()
def test_experts_that_round_one_input_go_on_when_they_round_another_too(half_rounded):
    model, tokens, sites, outer, down = half_rounded
    with rounded_inputs(sites, {**outer, **down}):
        both = model(tokens).logits
    told = []
    with rounded_inputs(sites, outer, lambda path, *_: told.append(path)):
        some = model(tokens).logits
        with rounded_inputs(sites, down):
            assert torch.equal(model(tokens).logits, both)
        assert torch.equal(model(tokens).logits, some)
    assert not torch.equal(some, both)
    assert set(told) == set(outer)


@torch.no_grad()
@pytest.mark.parametrize("all_experts", [False, True])
def test_recorded_inner_activations_follow_from_what_experts_round(half_rounded, all_experts):
    model, tokens, sites, outer, down = half_rounded
    read = {}
    with rounded_inputs(sites, {**outer, **down}, lambda path, x, _: read.update({path: x})):
        model(tokens)
    with rounded_inputs(sites, outer), recorded_inputs(sites, True, all_experts, outer) as inputs:
        model(tokens)
        found = {path: inputs.tensor(n) for n, readers in enumerate(inputs.readers) for path in readers}
    assert set(down) & set(read)
    for path in set(down) & set(read):
        rows = found[path]
        if all_experts:  # its own tokens are among them
            rows = rows[torch.cdist(read[path], rows).argmin(1)]
        torch.testing.assert_close(rows, read[path])


def test_gradients_reach_the_matrices_that_training_keeps_beside_the_weights(quantized):
    _, before, packed = quantized
    block = find_blocks(before)[0]
    path = next(iter(block.sites))
    layout = packed[path].layout
    g, groups = layout.group_size, layout.num_groups
    into = torch.eye(g).repeat(groups, 1, 1).requires_grad_()
    out_of = torch.eye(g).repeat(groups, 1, 1).requires_grad_()
    matrices = matrices_of(block.sites[path], into, out_of)
    assert all(map(is_matrix, matrices))
    (rounding,) = roundings_from(block.sites, {path: layout}, matrices).values()
    rounding(torch.randn(3, layout.in_features)).square().sum().backward()
    assert into.grad.abs().sum() > 0
    assert out_of.grad.abs().sum() > 0


def test_what_was_begun_can_be_ended(quantized):
    _, before, packed = quantized
    model = copy.deepcopy(before)
    block = find_blocks(model)[0]
    mine = {path: packed[path] for path in block.sites}
    with torch.no_grad():
        plain = model(TOKENS).logits
        undo = round_inputs(block.sites, roundings_of(block.sites, mine, CPU))
        assert not torch.equal(model(TOKENS).logits, plain)
        undo()
        assert torch.equal(model(TOKENS).logits, plain)
