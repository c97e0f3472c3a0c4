"""Layers of several places: folded into one, and called there; RWKV's rescaling turned off."""

from copy import deepcopy

import pytest
import torch
from families import FAMILIES
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from pairquant.models.sharing import Borrowed, fold_shared, lenders_of, settle_scales
from pairquant.models.sites import sites_in

TOKENS = torch.arange(3, 35).view(1, 32)


def made(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family].build()).eval().float()


@torch.no_grad()
@pytest.mark.parametrize("family", ["Zamba", "Zamba2"])
def test_a_folded_model_computes_the_same_with_fewer_layers(family):
    model = made(family)
    expected, before = model(TOKENS, use_cache=False).logits, len(list(sites_in(model)))
    values = sum(parameter.numel() for parameter in model.parameters())
    fold_shared(model)
    places = [module.place for module in model.modules() if isinstance(module, Borrowed)]
    assert places
    assert all("layers.1." in place or "layers.2." in place for place in places)
    assert len(list(sites_in(model))) < before
    assert sum(parameter.numel() for parameter in model.parameters()) == values, "every value is there once"
    assert torch.equal(model(TOKENS, use_cache=False).logits, expected)
    assert set(lenders_of(model.model.layers[3])) <= set(places)
    assert not lenders_of(model.model.layers[1])
    assert torch.equal(deepcopy(model)(TOKENS, use_cache=False).logits, expected)


@torch.no_grad()
def test_what_takes_the_lenders_place_is_called_by_all():
    model = made("Zamba")
    fold_shared(model)
    layer = model.model.layers[1].shared_transf.feed_forward
    layer.down_proj = torch.nn.Linear(64, 128, bias=False)
    borrowed = model.model.layers[3].shared_transf.feed_forward.down_proj
    assert borrowed.lender is layer.down_proj
    assert torch.equal(borrowed(x := torch.randn(2, 64)), layer.down_proj(x))
    assert not list(borrowed.parameters())
    model.tie_weights()  # finds nothing of it to tie


def test_tied_embeddings_stay():
    model = tiny_model("qwen3")
    tied = dict(model.all_tied_weights_keys)
    fold_shared(model)
    assert model.all_tied_weights_keys == tied
    assert not any(isinstance(module, Borrowed) for module in model.modules())


@torch.no_grad()
def test_without_rescaling_rwkv_computes_the_same():
    plain, settled = made("RWKV"), made("RWKV")
    assert plain.config.rescale_every == 1
    settle_scales(settled)
    assert settled.config.rescale_every == 0
    weight = settled.rwkv.blocks[2].attention.output.weight.clone()
    found, expected = (model(TOKENS, use_cache=False).logits.log_softmax(-1) for model in (settled, plain))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(settled.rwkv.blocks[2].attention.output.weight, weight)
    assert not torch.equal(plain.rwkv.blocks[2].attention.output.weight, weight), "which it did change"
    settle_scales(tiny_model())  # has nothing of the kind
