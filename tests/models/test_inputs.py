"""What linears read: one input for those that are handed the very same tensor."""

import pytest
import torch
from families import FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM

from pairquant.models.blocks import enter, find_blocks
from pairquant.models.inputs import recorded_inputs
from pairquant.models.sites import sites_in


def test_the_same_tensor_is_one_input_and_an_equal_one_is_another():
    module = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q", "k", "o")})
    sites = {site.path: site for site in sites_in(module)}
    x = torch.randn(2, 3, 4)
    with recorded_inputs(sites) as inputs:
        module["q"](x)
        module["o"](x.clone())
        module["k"](x)
    assert inputs.readers == [["q", "k"], ["o"]]
    assert [tuple(tensor.shape) for tensor in inputs.tensors] == [(6, 4), (6, 4)]


def test_nothing_is_recorded_once_the_context_is_closed():
    module = nn.Linear(4, 4)
    sites = {site.path: site for site in sites_in(module, "a")}
    with recorded_inputs(sites) as inputs:
        pass
    module(torch.randn(1, 4))
    assert inputs.readers == []
    assert not module._forward_pre_hooks


@pytest.fixture(params=["Qwen3-MoE", "gpt-oss", "Nemotron-H"])
def routed_block(request):
    """The first block with experts of a tiny model, what enters it, and the arguments it is called with."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[request.param].build()).eval().float()
    blocks = find_blocks(model)
    number = next(i for i, block in enumerate(blocks) if any(site.pool for site in block.sites.values()))
    tokens = torch.randint(3, 259, (3, 24), generator=torch.Generator().manual_seed(1))
    entry = enter(model, blocks, tokens, 3)
    return blocks[number], entry.calls[number], entry.hidden[0]


def one_expert(module, number, x):
    """What one expert returns for all tokens x [T, H], by the module's own forward pass."""
    index = torch.full((len(x), 1), number)
    return module(x, index, torch.ones(len(x), 1))


@torch.no_grad()
def test_every_token_goes_to_every_expert_for_the_record_only(routed_block):
    block, call, hidden = routed_block
    experts = [site for site in block.sites.values() if site.pool]
    module, seen = experts[0].module, []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    expected = call.run(block.module, hidden)
    with recorded_inputs(block.sites, all_experts=True) as inputs:
        found = call.run(block.module, hidden)
    handle.remove()
    assert torch.equal(found, expected)
    of_experts = [n for n, routed in enumerate(inputs.routed) if routed]
    outer, *inner = of_experts
    assert inputs.readers[outer] == [site.path for site in experts if site.part != "down_proj"]
    assert torch.equal(inputs.tensor(outer), seen[0])
    assert len(inner) == 4
    for number, place in enumerate(inner):
        down = next(site for site in experts if site.number == number and site.part == "down_proj")
        assert inputs.readers[place] == [down.path]
        result = inputs.tensor(place) @ down.weight.T + (0 if down.bias is None else down.bias)
        torch.testing.assert_close(result, one_expert(module, number, seen[0]), rtol=1e-4, atol=1e-6)


def test_inner_activations_are_computed_when_they_are_asked_for(routed_block):
    block, call, hidden = routed_block
    for all_experts in (False, True):
        with torch.no_grad(), recorded_inputs(block.sites, all_experts=all_experts) as inputs:
            call.run(block.module, hidden)
        kept = [n for n, tensor in enumerate(inputs.tensors) if isinstance(tensor, torch.Tensor)]
        readers = [path for n in kept for path in inputs.readers[n]]
        assert not [path for path in readers if block.sites[path].pool and block.sites[path].part == "down_proj"]
