"""Blocks, their calls and their inputs are found in every family without knowing its classes."""

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from torch import nn

from pairquant.models.blocks import enter, find_blocks, run_from
from pairquant.models.inputs import recorded_inputs
from pairquant.optimize.moments import MomentSum
from pairquant.optimize.walk import quantize_blocks
from pairquant.spec.options import QuantConfig
from pairquant.spec.recipe import Recipe
from pairquant.support.errors import CalibrationError, SourceError


@pytest.fixture
def tokens():
    return torch.randint(3, 259, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_running_the_blocks_one_by_one_equals_the_model(family, tokens):
    model = tiny_model(family)
    blocks = find_blocks(model)
    assert len(blocks) == 2
    entry = enter(model, blocks, tokens, micro_batch=2)
    assert entry.passes == 1
    last = []
    blocks[-1].module.register_forward_hook(lambda _, __, out: last.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids=tokens[:2], use_cache=False)
        states = entry.hidden[0]
        for block, call in zip(blocks, entry.calls, strict=True):
            states = call.run(block.module, states)
    torch.testing.assert_close(states, last[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_running_what_follows_the_blocks_gives_the_logits(family, tokens):
    model = tiny_model(family)
    blocks = find_blocks(model)
    last = []
    handle = blocks[-1].module.register_forward_hook(
        lambda _, __, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        logits = model(input_ids=tokens[:1], use_cache=False).logits
    handle.remove()
    states = last[0].requires_grad_()
    found = run_from(model, blocks, tokens[:1], states)
    torch.testing.assert_close(found, logits)
    assert torch.autograd.grad(found.sum(), states)[0].abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens[:1], use_cache=False).logits, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_that_read_the_same_tensor_are_grouped(family, tokens):
    model = tiny_model(family)
    block = find_blocks(model)[0]
    with torch.no_grad(), recorded_inputs(block.sites) as inputs:
        model(input_ids=tokens, use_cache=False)
    groups = {frozenset(path.rpartition(".")[2] for path in readers) for readers in inputs.readers}
    attention = {"qkv_proj"} if family == "phi3" else {"q_proj", "k_proj", "v_proj"}
    mlp = {"gate_up_proj"} if family in ("phi3", "glm4") else {"gate_proj", "up_proj"}
    assert groups == {frozenset(names) for names in (attention, {"o_proj"}, mlp, {"down_proj"})}


def test_moments_equal_the_sum_over_all_tokens(tokens):
    model = tiny_model()
    block = find_blocks(model)[0]
    total, seen = MomentSum(), []
    handle = block.module.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in tokens.split(2):
            with recorded_inputs(block.sites) as inputs:
                model(input_ids=batch, use_cache=False)
            total.add(inputs)
    handle.remove()
    x = torch.cat(seen).double()
    (moments,) = [m for m in total.checked(block.sites)[0] if m.readers == ["model.layers.0.mlp.down_proj"]]
    torch.testing.assert_close(moments.hessian.double(), x.T @ x, rtol=1e-4, atol=1e-4)


def test_ignored_linears_are_left_alone():
    blocks = find_blocks(tiny_model(), ("down_proj", r"re:model\.layers\.1\."))
    assert [p for b in blocks for p in b.sites] == [
        f"model.layers.0.{name}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    ] + ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]


def test_a_model_without_blocks_is_refused():
    with pytest.raises(SourceError, match="no list of blocks"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_a_linear_that_never_runs_is_named(tokens):
    model = tiny_model()
    model.model.layers[0].mlp.spare = nn.Linear(128, 128)
    config = QuantConfig(group_size=32, recipe=Recipe(steps=1))
    first, _ = quantize_blocks(model, tokens, config, torch.device("cpu"))
    assert first.uncalled == ["model.layers.0.mlp.spare"]
    assert len(first.packed) == 7


def test_a_linear_that_runs_twice_is_fitted_on_all_of_its_inputs(tokens):
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + mlp.up_proj(x * 2).sum() * 0
    config = QuantConfig(group_size=32, recipe=Recipe(steps=1))
    first, *_ = quantize_blocks(model, tokens, config, torch.device("cpu"))
    assert "model.layers.0.mlp.up_proj" in first.packed
    assert first.errors["model.layers.0.mlp.up_proj"] < 0.1


def test_a_block_at_two_places_is_refused():
    model = tiny_model()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(SourceError, match=r"layers\.0 and model\.layers\.1 are the same block"):
        find_blocks(model)


def test_blocks_that_run_several_times_are_counted(tokens):
    class Looped(nn.Module):
        """Runs through the blocks three times."""

        def __init__(self, model):
            super().__init__()
            self.model = model
            plain = model.model.forward

            def loop(input_ids=None, inputs_embeds=None, **kwargs):
                out = plain(input_ids=input_ids, **kwargs)
                for _ in range(2):
                    out = plain(inputs_embeds=out.last_hidden_state, **kwargs)
                return out

            model.model.forward = loop

        def forward(self, **kwargs):
            return self.model(**kwargs)

        def get_output_embeddings(self):
            return self.model.get_output_embeddings()

    model = Looped(tiny_model())
    entry = enter(model, find_blocks(model), tokens, micro_batch=2)
    assert entry.passes == 3
    assert [len(hidden) for hidden in entry.hidden] == [2, 2]


def test_blocks_are_those_of_the_part_that_reads_tokens():
    """A tower for images may hold more weights."""
    model = tiny_model()
    model.tower = torch.nn.ModuleList([torch.nn.Linear(512, 512) for _ in range(3)])
    assert [block.path for block in find_blocks(model)] == ["model.layers.0", "model.layers.1"]


def test_activations_that_are_not_finite_name_the_layers(tokens):
    model = tiny_model()
    model.model.layers[0].input_layernorm.weight.data[3] = float("inf")
    config = QuantConfig(group_size=32, recipe=Recipe(steps=1))
    with pytest.raises(CalibrationError, match=r"layers\.0\.self_attn\.q_proj.*not finite"):
        list(quantize_blocks(model, tokens, config, torch.device("cpu")))
