"""Forms of experts: stated by Transformers' interface, known by name, or none; what each kind is called with."""

import pytest
import torch
from families import FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM

from pairquant.core.linear import Transform, decode, encode
from pairquant.layers.expert_form import ExpertForm
from pairquant.models.inputs import recorded_inputs
from pairquant.models.sites import ExpertSite, packed_experts, sites_in
from pairquant.spec.linear import Spec
from pairquant.spec.recipe import PRESETS


def experts_of(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family].build()).eval().float()
    module = next(module for module in model.modules() if ExpertForm.of(module) is not None)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    place = next(path for path, other in model.named_modules() if other is module)
    return model, module, [s for s in sites_in(model) if isinstance(s, ExpertSite) and s.place == place]


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("Qwen3-MoE", ExpertForm()),
        ("gpt-oss", ExpertForm(is_concatenated=False, is_transposed=True)),
        ("Nemotron-H", ExpertForm(has_gate=False)),
        ("Llama 4 (text)", ExpertForm(is_transposed=True, one_after_another=True)),
        ("LongCat-Flash", ExpertForm(returns_input=True)),
    ],
)
def test_the_form_of_a_family(family, form):
    _, module, _ = experts_of(family)
    assert ExpertForm.of(module) == form


def test_a_module_of_another_form_is_none():
    assert ExpertForm.of(nn.Linear(4, 4)) is None
    unknown = nn.Module()
    unknown.down_proj, unknown.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 4)), nn.Parameter(torch.zeros(2, 8, 4))
    assert ExpertForm.of(unknown) is None


def packed_in_place_of(module, sites):
    """The experts' module with codes, and the plain one with the weights that these stand for."""
    linears = {}
    for site in sites:
        layout = Spec(4, 32, 0).layout(site.size.in_features, site.size.out_features, site.size.bias)
        channels = site.size.in_features
        none = torch.zeros(0, channels // 2), torch.zeros(0, channels, dtype=torch.int16)
        linears[site.path] = encode(
            site.weight, Transform.build(*none, torch.ones(channels), 32), None, layout, PRESETS["rtn"], site.bias
        )
        site.put(decode(linears[site.path]))
    state = {
        site.stored_name(name).removeprefix(f"{site.place}."): tensor
        for site in sites
        for name, tensor in linears[site.path].tensors.items()
    }
    return linears, state


@torch.no_grad()
def test_experts_that_return_their_input_do_so(generator):
    _, module, sites = experts_of("LongCat-Flash")
    linears, state = packed_in_place_of(module, sites)
    tokens = torch.randn(20, 64, generator=generator)
    index = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(20)])
    assert (index >= 4).any(), "some tokens go to experts without weights"
    weights = torch.rand(20, 2, generator=generator)
    expected = module(tokens, index, weights)
    made = packed_experts([(site, linears[site.path].layout) for site in sites])
    made.load_state_dict(state)
    torch.testing.assert_close(made(tokens, index, weights), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_experts_that_are_called_one_after_another(generator):
    _, module, sites = experts_of("Llama 4 (text)")
    linears, state = packed_in_place_of(module, sites)
    chosen = torch.randint(0, 4, (12,), generator=generator)
    rows = torch.randn(12, 64, generator=generator) * (torch.arange(4)[:, None, None] == chosen[:, None])
    rows = rows.flatten(0, 1)  # [4 experts · 12 tokens, 64]
    expected = module(rows)
    with recorded_inputs({site.path: site for site in sites}) as inputs:
        module(rows)
    seen = {
        reader.rpartition(".experts.")[2]: inputs.tensor(i) for i, all_ in enumerate(inputs.readers) for reader in all_
    }
    for number in range(4):
        assert len(seen[f"{number}.up_proj"]) == (chosen == number).sum(), "only what the router gives it"
    made = packed_experts([(site, linears[site.path].layout) for site in sites])
    made.load_state_dict(state)
    torch.testing.assert_close(made(rows), expected, rtol=1e-4, atol=1e-5)
    assert not made(torch.zeros_like(rows)).any()
