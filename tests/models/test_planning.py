"""The plan of a model: patterns that name nothing, what stays plain and why, and what cannot be quantized."""

import pytest
import torch
from families import FAMILIES, random_model
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from pairquant.models.blocks import find_blocks
from pairquant.models.planning import plan_model, uncovered
from pairquant.models.sharing import fold_shared
from pairquant.spec.options import QuantConfig
from pairquant.support.errors import ConfigError


def options(*ignore, **others):
    return QuantConfig(**{"group_size": 32, "ignore": ("lm_head", *ignore), **others})


def test_every_linear_is_planned_or_plain_with_its_reason():
    model = tiny_model()
    plan, blocks = plan_model(model, options("down_proj"))
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(plan.layouts) | set(plan.plain) == linears
    assert set(plan.layouts) == {path for block in blocks for path in block.sites}
    assert plan.plain["lm_head"] == "--ignore lm_head"
    assert plan.plain["model.layers.0.mlp.down_proj"] == "--ignore down_proj"


def test_a_linear_whose_weight_engines_take_apart_reads_its_input_as_it_is():
    model = random_model("DeepSeek V2")
    plan, _ = plan_model(model, QuantConfig(preset="rtn", group_size=32, activations="int8"))
    rounded = {path.rpartition(".")[2] for path, layout in plan.layouts.items() if layout.activations == "int8"}
    assert "kv_b_proj" not in rounded
    assert {"kv_a_proj_with_mqa", "o_proj", "down_proj"} <= rounded
    path = "model.layers.0.self_attn.kv_b_proj"
    assert plan.exceptions[path].activations is None
    assert plan.reasons[path] == "its input is not rounded: engines take its weight apart"
    plan, _ = plan_model(model, QuantConfig(preset="rtn", group_size=32))
    assert path not in plan.reasons


def test_a_pattern_that_names_nothing_is_refused_with_a_guess():
    with pytest.raises(ConfigError, match=r"'down_porj' names no module.*did you mean 'down_proj'"):
        plan_model(tiny_model(), options("down_porj"))


def test_nothing_left_to_quantize_is_refused():
    with pytest.raises(ConfigError, match="leaves no linear layer"):
        plan_model(tiny_model(), options("model.layers"))


def test_activations_of_layers_that_blocks_share_are_refused():
    model = AutoModelForCausalLM.from_config(FAMILIES["Zamba"].build())
    fold_shared(model)
    assert plan_model(model, options())
    with pytest.raises(
        ConfigError, match=r"activations is 'int8', allowed for this model: None.*shared_transf.*Leave --activa"
    ):
        plan_model(model, options(activations="int8"))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(8, 128, 128))


def test_a_large_weight_that_no_site_covers_is_refused_and_can_be_ignored():
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.experts = Experts()
    with pytest.raises(ConfigError) as caught:
        plan_model(model, options())
    assert "are in 2 matrices that cannot be quantized yet, such as model.layers.0.mlp.experts.gate_up_proj" in str(
        caught.value
    )
    assert "--ignore 're:.*gate_up_proj$'" in str(caught.value)
    plan, blocks = plan_model(model, options("re:.*gate_up_proj$"))
    assert len(plan.layouts) == 14
    assert uncovered(blocks[0]) == {"model.layers.0.mlp.experts.gate_up_proj": 8 * 128 * 128}


def test_small_parameters_are_no_matter():
    model = tiny_model()
    model.model.layers[0].mlp.gate = nn.Parameter(torch.zeros(2, 128))
    plan_model(model, options())
    assert uncovered(find_blocks(tiny_model())[0]) == {}
