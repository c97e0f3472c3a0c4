"""Strategies: which recipe gets which, mixed specs in one block, and weights out of fp16's range."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from pairquant.core.linear import decode
from pairquant.models import inputs
from pairquant.optimize import noise
from pairquant.optimize.strategies import BlockTraining, InTurn, Refitting, Rounding, strategy_for
from pairquant.optimize.streams import Streams
from pairquant.optimize.walk import quantize_blocks
from pairquant.spec.linear import Spec
from pairquant.spec.options import QuantConfig
from pairquant.spec.recipe import PRESETS, Recipe, Refit, Training

CPU = torch.device("cpu")
SHORT = {
    "rounding": Recipe(steps=5),
    "refit": Recipe(steps=5, refit=Refit(epochs=1, batch=4)),
    "training": Recipe(training=Training(epochs=1, weight_epochs=1, batch=4), rounding="nearest"),
    "nearest": PRESETS["rtn"],
}
MIXED = ("down_proj=bits:8,rotations:0", "o_proj=bits:5,group_size:64", "k_proj=bits:6,rotations:2", "up_proj=bits:2")


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 259, (4, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("preset", "kind"),
    [("fast", Rounding), ("best", Refitting), ("paper", BlockTraining), ("quick", Rounding), ("rtn", Rounding)],
)
def test_each_recipe_has_its_strategy(preset, kind):
    assert type(strategy_for(QuantConfig(preset=preset))) is kind


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("recipe", SHORT)
def test_one_block_may_hold_many_specs(recipe, shared, tokens):
    config = QuantConfig(group_size=32, rotations=4, recipe=SHORT[recipe], overrides=MIXED, share_rotations=shared)
    model = tiny_model()
    for result in quantize_blocks(model, tokens, config, CPU):
        for path, packed in result.packed.items():
            rotations = 4 if config.recipe.fits_transform else 0
            spec = {
                "down_proj": Spec(8, 32, 0), "o_proj": Spec(5, 64, rotations), "k_proj": Spec(6, 32, min(2, rotations)),
                "up_proj": Spec(2, 32, rotations),
            }.get(path.rpartition(".")[2], Spec(4, 32, rotations))  # fmt: skip
            assert packed.layout.spec == spec
            packed.check_values(path)
            assert torch.equal(model.get_submodule(path).weight, decode(packed))
        kinds = {path.rpartition(".")[2]: error for path, error in result.errors.items()}
        assert kinds["down_proj"] < 0.01 < kinds["up_proj"] < 1, "8 bits are far closer than 2"
        assert kinds["k_proj"] < 0.02, "6 bits"
        groups = {frozenset(p.rpartition(".")[2] for p in group) for group in result.shared}
        reads = shared and config.recipe.needs_text  # what reads the same input is not known without text
        assert groups == ({frozenset({"q_proj", "v_proj"})} if reads else set())


@pytest.mark.parametrize("recipe", SHORT)
def test_an_mlp_scaled_up_and_down_is_fitted_as_the_plain_one(recipe, tokens):
    """The same function, with its weights out of fp16's range: up / 10⁶ and down · 10⁶."""
    errors = {}
    for size in (1.0, 1e6):
        model = tiny_model()
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.data /= size
            layer.mlp.down_proj.weight.data *= size
        config = QuantConfig(group_size=32, recipe=SHORT[recipe])
        results = list(quantize_blocks(model, tokens, config, CPU))
        errors[size] = [e for r in results for path, e in r.errors.items() if path.endswith(("up_proj", "down_proj"))]
    assert max(errors[1e6]) < 1.3 * max(errors[1.0])


def test_the_recorded_error_is_that_of_the_weight_in_the_block(tokens):
    config = QuantConfig(group_size=32, recipe=replace(SHORT["rounding"], drift=0.0))
    results = list(quantize_blocks(tiny_model(), tokens, config, CPU))
    assert all(0 < error < 0.05 for result in results for error in result.errors.values())


@pytest.mark.parametrize(
    ("activations", "windows", "corrected"),
    [
        ("int4", 32, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}),
        ("int4", 31, set()),
        ("int8", 48, set()),
    ],
)
def test_weights_are_fitted_to_rounded_inputs_where_the_text_is_long_enough(
    activations, windows, corrected, monkeypatch
):
    """32 windows of 128 tokens are 32 tokens for each of 128 channels, but not for the 192 of down_proj."""
    text = torch.randint(3, 259, (windows, 128), generator=torch.Generator().manual_seed(1))
    config = QuantConfig(preset="gptq", group_size=32, activations=activations)
    as_it_is = next(quantize_blocks(tiny_model(), text, config, CPU)).packed
    monkeypatch.setattr(noise, "CORRECTED", {})
    without = next(quantize_blocks(tiny_model(), text, config, CPU)).packed
    differing = {
        p.rpartition(".")[2] for p in without if not torch.equal(as_it_is[p]["qweight"], without[p]["qweight"])
    }
    assert differing == corrected


@pytest.mark.parametrize(("all_experts", "corrected"), [(False, {"gate_proj", "up_proj", "down_proj"}), (True, set())])
def test_experts_are_fitted_to_rounded_inputs_where_their_router_gives_them_enough_tokens(
    all_experts, corrected, tokens, monkeypatch
):
    def fitted(least):
        monkeypatch.setattr(noise, "CORRECTED", least)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES["Mixtral"].build()).eval()
        config = QuantConfig(preset="gptq", group_size=32, activations="int4", all_experts=all_experts)
        return next(quantize_blocks(model, tokens % 200, config, CPU)).packed

    found, without = fitted({"int4": 1e-3}), fitted({})
    differing = {p for p in found if not torch.equal(found[p]["qweight"], without[p]["qweight"])}
    experts = {path.rpartition(".")[2] for path in differing if ".experts." in path}
    assert experts == corrected
    assert any(path.endswith("q_proj") for path in differing)


def in_turn(family="llama"):
    """A model, and the options by which its linears are fitted one input after the other."""
    model = tiny_model() if family == "llama" else AutoModelForCausalLM.from_config(FAMILIES[family].build()).eval()
    recipe = replace(PRESETS["paper"], steps=3)
    return model, QuantConfig(preset="paper", recipe=recipe, group_size=32, rotations=2, activations="int4")


def test_each_input_is_seen_again_once_the_linears_before_it_are_quantized(tokens, monkeypatch):
    """Four inputs in a block: of q, k and v, of o, of gate and up, and of down. The first is as the walk has just seen it."""
    model, config = in_turn()
    assert type(strategy_for(config)) is InTurn
    passes, observe = [], Streams.observe
    monkeypatch.setattr(Streams, "observe", lambda *a, **k: passes.append(k.get("roundings", {})) or observe(*a, **k))
    result = next(quantize_blocks(model, tokens, config, CPU))
    assert [len(rounded) for rounded in passes] == [0, 3, 4, 6]
    assert len(result.packed) == 7


def test_the_last_product_of_experts_is_fitted_on_what_rounded_ones_before_it_put_out(tokens, monkeypatch):
    def fitted():
        torch.manual_seed(0)
        model, config = in_turn("Mixtral")
        return next(quantize_blocks(model, tokens % 200, config, CPU)).packed

    found = fitted()
    monkeypatch.setattr(inputs, "_as_multiplied", lambda x, sites, roundings: x)
    without = fitted()
    differing = {
        path.rpartition(".")[2] for path in found if not torch.equal(found[path]["qweight"], without[path]["qweight"])
    }
    assert differing == {"down_proj"}


def test_a_stage_that_fails_leaves_no_rounding_behind(tokens, monkeypatch):
    model, config = in_turn()
    stages, rounded = [], Rounding.rounded

    def failing(self, work):
        stages.append(work)
        if len(stages) == 2:
            raise RuntimeError("the second stage fails")
        return rounded(self, work)

    monkeypatch.setattr(Rounding, "rounded", failing)
    with pytest.raises(RuntimeError, match="second stage"):
        next(quantize_blocks(model, tokens, config, CPU))
    assert not any(module._forward_pre_hooks for module in model.modules())
