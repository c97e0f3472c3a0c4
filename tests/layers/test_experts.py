"""The experts' module against every expert's decoded weight, and its tensors through moves, casts and saving."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM

from pairquant.backends.experts import explain_experts
from pairquant.backends.triton_kernels import TritonKernels
from pairquant.core.linear import Transform, decode, encode
from pairquant.core.pairs import select_pairs
from pairquant.models.sites import ExpertSite, packed_experts, sites_in
from pairquant.spec.linear import Spec
from pairquant.spec.recipe import PRESETS
from pairquant.support.errors import CheckpointError

KINDS = ["Qwen3-MoE", "gpt-oss", "Nemotron-H"]  # joined; interleaved, transposed, with biases; without a gate


def experts_of(family):
    """The first experts of a tiny model, with random weights, and their sites."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family].build()).float()
    sites = [site for site in sites_in(model) if isinstance(site, ExpertSite)]
    sites = [site for site in sites if site.place == sites[0].place]
    module = sites[0].module
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module, sites


def transform(channels, generator):
    groups = channels // 32
    rank = torch.rand(groups, 32, 32, generator=generator)
    pairs = select_pairs(rank, 2).pairs
    theta = torch.randn(2, channels // 2, generator=generator)
    return Transform.build(theta, pairs, torch.rand(channels, generator=generator) + 0.5, 32)


@pytest.fixture(params=KINDS)
def packed(request, generator):
    """The plain module with the decoded weights, and what stands for it."""
    return packed_as(Spec(4, 32, 2), request.param, generator)


def packed_as(spec, family, generator):
    """What stands for a family's experts, its stored tensors, arguments to call it with, and what the decoded experts answer."""
    module, sites = experts_of(family)
    shared, linears = {}, {}
    for site in sites:
        size = site.size
        if site.pool not in shared:
            shared[site.pool] = transform(size.in_features, generator)
        layout = spec.layout(size.in_features, size.out_features, size.bias)
        linears[site.path] = encode(site.weight, shared[site.pool], None, layout, PRESETS["rtn"], site.bias)
        site.put(decode(linears[site.path]))
    if sites[0].size.bias:
        for parameter in (module.gate_up_proj_bias, module.down_proj_bias):
            parameter.data = parameter.data.half().float()
    plain = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    tokens, count = torch.randn(24, sites[0].size.in_features, generator=generator), len(plain["down_proj"])
    index = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(24)])
    weights = torch.rand(24, 2, generator=generator)
    module.config._experts_implementation = "eager"
    with torch.no_grad():
        expected = module(tokens, index, weights)
    made = packed_experts([(site, linears[site.path].layout) for site in sites])
    home = sites[0].place
    state = {}
    for site in sites:
        for name, tensor in linears[site.path].tensors.items():
            state[site.stored_name(name).removeprefix(f"{home}.")] = tensor
    made.load_state_dict(state)
    return made, state, (tokens, index, weights), expected


@torch.no_grad()
def test_it_computes_what_the_decoded_experts_do(packed):
    made, state, arguments, expected = packed
    torch.testing.assert_close(made(*arguments), expected, rtol=1e-4, atol=1e-5)
    assert set(made.state_dict()) == set(state)


@torch.no_grad()
def test_in_bfloat16_it_is_as_close_as_that_allows(packed):
    made, state, (tokens, index, weights), expected = packed
    made.to(torch.bfloat16)
    assert all(torch.equal(tensor, state[name]) for name, tensor in made.state_dict().items()), "bits changed"
    found = made(tokens.bfloat16(), index, weights)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.03 * expected.norm()
    assert not any("qweight" in name for name, _ in made.named_buffers()), "the codes are held twice"
    saved = made.state_dict()
    assert set(saved) == set(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved.items())
    torch.testing.assert_close(made(tokens, index, weights), expected, rtol=1e-4, atol=1e-5)  # float32 is decoded
    made.load_state_dict(saved)
    assert torch.equal(made(tokens.bfloat16(), index, weights), found)


@torch.no_grad()
def test_no_tokens_and_tokens_for_no_expert(packed):
    made, _, (tokens, index, weights), _ = packed
    assert made(tokens[:0], index[:0], weights[:0]).shape == tokens[:0].shape
    assert not made(tokens, torch.full_like(index, made.count), weights).any()


def test_every_weight_can_be_looked_at(packed):
    made, state, _, _ = packed
    found = dict(made.packed())
    assert len(found) == made.count * len(made.plans)
    assert all(f"{path}.qweight" in state for path in found)


def test_experts_that_are_missing_or_differ_are_refused():
    _, sites = experts_of("Qwen3-MoE")
    layouts = [(s, Spec(4, 32, 2).layout(s.size.in_features, s.size.out_features)) for s in sites]
    with pytest.raises(CheckpointError, match="11 weights of the experts"):
        packed_experts(layouts[1:])
    site, _ = layouts[3]
    odd = [*layouts[:3], (site, Spec(8, 32, 2).layout(site.size.in_features, site.size.out_features)), *layouts[4:]]
    with pytest.raises(CheckpointError, match="is stored otherwise than the other experts"):
        packed_experts(odd)


@pytest.fixture
def kernels(monkeypatch):
    """Our kernels for GPUs, in Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(TritonKernels, "refusal", lambda self, layout, device, dtype: None)


@torch.no_grad()
@pytest.mark.parametrize(("activations", "family"), [("int4", "Qwen3-MoE"), ("mxfp4", "gpt-oss")])
def test_our_kernels_round_what_experts_read(activations, family, kernels, generator):
    made, _, (tokens, index, weights), plain = packed_as(Spec(4, 32, 2, activations=activations), family, generator)
    wanted = made(tokens, index, weights)  # in float32, which no kernel multiplies
    found = made(tokens.half(), index, weights)
    assert made._prepared is not None
    near, far = (found.float() - wanted).norm(), (found.float() - plain).norm()
    assert near < far / 2


@torch.no_grad()
def test_our_kernels_compute_the_same_and_give_the_stored_bits_back(packed, kernels):
    made, state, (tokens, index, weights), expected = packed
    found = made(tokens.half(), index, weights)
    assert not any("qweight" in name for name, _ in made.named_buffers())
    assert (found.float() - expected).norm() < 0.004 * expected.norm()
    plain_silu = made.form.has_gate and made.form.is_concatenated  # gpt-oss cuts off and adds one, Nemotron-H squares
    assert made._known_activation() == ("silu" if plain_silu else "")
    saved = made.state_dict()
    assert set(saved) == set(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved.items())
    made.load_state_dict(saved)
    assert made._prepared is None
    assert all(torch.equal(tensor, state[name]) for name, tensor in made.named_buffers())


@torch.no_grad()
def test_our_kernels_leave_out_ids_that_stand_for_no_expert(packed, kernels):
    made, _, (tokens, index, weights), _ = packed
    without = index.clone()
    without[:, 1] = made.count
    once = made(tokens.half(), index[:, :1], weights[:, :1])
    torch.testing.assert_close(made(tokens.half(), without, weights), once, rtol=0, atol=1e-3)


@torch.no_grad()
def test_float32_is_never_multiplied_in_16_bits(packed):
    made, _, (tokens, index, weights), expected = packed
    assert not made.prepare(torch.float32)
    torch.testing.assert_close(made(tokens, index, weights), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_to_the_input_where_the_product_has_none(packed, kernels, dtype):
    made, _, (tokens, index, weights), _ = packed
    made.prepare(torch.bfloat16)
    x = tokens.to(dtype).requires_grad_()
    made(x, index, weights).float().sum().backward()
    assert x.grad is not None
    step = 1e-2 * x.grad.float() / x.grad.float().norm()
    with torch.no_grad():
        exact = [made(tokens + sign * step, index, weights).sum() for sign in (1, -1)]
    expected = (x.grad.float() * step).sum()
    assert abs((exact[0] - exact[1]) / 2 - expected) < 0.1 * abs(expected)


@pytest.fixture(params=["Qwen3-MoE", "gpt-oss"])
def own(request, generator):
    """Experts with transforms of their own: the plain module with the decoded weights, and what stands for it."""
    module, sites = experts_of(request.param)
    sites = [replace(site, own_transform=True) for site in sites]
    linears, transforms = {}, {}
    for site in sites:
        size = site.size
        if site.transform_name not in transforms:
            transforms[site.transform_name] = transform(size.in_features, generator)
        layout = Spec(4, 32, 2).layout(size.in_features, size.out_features, size.bias)
        linears[site.path] = encode(
            site.weight, transforms[site.transform_name], None, layout, PRESETS["rtn"], site.bias
        )
        site.put(decode(linears[site.path]))
    assert len(transforms) == 2 * len(module.down_proj)
    if sites[0].size.bias:
        for parameter in (module.gate_up_proj_bias, module.down_proj_bias):
            parameter.data = parameter.data.half().float()
    tokens, count = torch.randn(24, sites[0].size.in_features, generator=generator), len(module.down_proj)
    index = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(24)])
    weights = torch.rand(24, 2, generator=generator)
    module.config._experts_implementation = "eager"
    with torch.no_grad():
        expected = module(tokens, index, weights)
    made = packed_experts([(site, linears[site.path].layout) for site in sites], per_expert=True)
    home = sites[0].place
    state = {
        site.stored_name(name).removeprefix(f"{home}."): tensor
        for site in sites
        for name, tensor in linears[site.path].tensors.items()
    }
    made.load_state_dict(state)
    return made, state, (tokens, index, weights), expected


@torch.no_grad()
def test_experts_with_transforms_of_their_own(own):
    made, state, (tokens, index, weights), expected = own
    torch.testing.assert_close(made(tokens, index, weights), expected, rtol=1e-4, atol=1e-5)
    assert set(made.state_dict()) == set(state)
    assert sum(name.endswith("_weight_theta") for name in state) == 2 * made.count
    made.check_values("home")
    found = made.to(torch.bfloat16)(tokens.bfloat16(), index, weights)
    assert all(torch.equal(tensor, state[name]) for name, tensor in made.state_dict().items()), "bits changed"
    assert (found.float() - expected).norm() < 0.03 * expected.norm()


@torch.no_grad()
def test_no_kernel_of_ours_takes_experts_with_transforms_of_their_own(own, kernels):
    made, _, (tokens, index, weights), expected = own
    assert not made.prepare(torch.float16)
    found = made(tokens.half(), index, weights)
    assert (found.float() - expected).norm() < 0.004 * expected.norm()
    layout, device = made.plans["up_proj"].layout, torch.device("cpu")
    assert explain_experts([layout], device, torch.float16).backend == TritonKernels.name
    explained = explain_experts([layout], device, torch.float16, per_expert=True)
    assert explained.backend == "decoded"
    assert "transform of its own" in explained.refusals[TritonKernels.name]
