"""What is taken out of a checkpoint's tensors before vLLM's models see them, and what is decoded for them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="needs vLLM")

from packed import random_packed

from pairquant.core.linear import decode
from pairquant.spec.checkpoint import CheckpointConfig
from pairquant.spec.linear import Spec
from pairquant.support.errors import CheckpointError, ConfigError

SPEC = Spec(4, 32, 2)
#: Path in the checkpoint → what is packed there.
PACKED = {
    "text.mixer.in_proj": random_packed(96, 64, 32, 2, seed=1),
    "text.mlp.up_proj": random_packed(96, 64, 32, 2, seed=2),
}


@pytest.fixture
def config():
    from vllm.model_executor.models.utils import WeightsMapper

    from pairquant.integrations.vllm.config import PairQuantConfig

    config = PairQuantConfig(CheckpointConfig(SPEC))
    config.quantized = dict.fromkeys(PACKED, SPEC)
    config.stored_as = {path: path for path in PACKED}
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"text.": "model."}))
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    return config


class Model(nn.Module):
    """A model in which each of these linears has a plain weight."""

    def __init__(self, *plain):
        super().__init__()
        for path in plain:
            parent = self
            for name in path.split("."):
                if name not in parent._modules:
                    parent.add_module(name, nn.Module())
                parent = parent.get_submodule(name)
            parent.weight = nn.Parameter(torch.empty(1))


def checkpoint():
    tensors = {f"{path}.{name}": tensor for path, linear in PACKED.items() for name, tensor in linear.tensors.items()}
    return tensors | {"text.norm.weight": torch.ones(64)}


def sorted_out(tensors, model, config):
    from pairquant.integrations.vllm.config import sort_out

    return dict(sort_out(tensors.items(), model, config, torch.bfloat16))


def test_a_linear_that_vllm_runs_plain_is_decoded_and_all_else_passes(config):
    found = sorted_out(checkpoint(), Model("model.mixer.in_proj"), config)
    left = {f"text.mlp.up_proj.{name}" for name in PACKED["text.mlp.up_proj"].tensors}
    assert set(found) == {"text.mixer.in_proj.weight", "text.norm.weight"} | left
    weight = found["text.mixer.in_proj.weight"]
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, decode(PACKED["text.mixer.in_proj"]).bfloat16())


def test_a_linear_that_vllm_runs_plain_but_rounds_what_it_reads_is_refused(config):
    config.quantized["model.mixer.in_proj"] = Spec(4, 32, 2, activations="int8")
    with pytest.raises(
        ConfigError, match=r"text\.mixer\.in_proj rounds what it reads to int8, .* without --activations"
    ):
        sorted_out(checkpoint(), Model("model.mixer.in_proj"), config)
    assert "text.mlp.up_proj.weight" in sorted_out(checkpoint(), Model("model.mlp.up_proj"), config), (
        "the one that rounds is run by our method"
    )


def test_a_linear_merged_into_a_plain_one_is_decoded_too(config):
    assert "text.mlp.up_proj.weight" in sorted_out(checkpoint(), Model("model.mlp.gate_up_proj"), config)


def test_a_linear_whose_layer_has_our_method_is_left_as_it_is(config):
    config.claimed.add("model.mixer.in_proj")
    found = sorted_out(checkpoint(), Model("model.mixer.in_proj"), config)
    assert found.keys() == checkpoint().keys()


def test_a_bias_passes(config):
    tensors = checkpoint() | {"text.mixer.in_proj.bias": torch.ones(96)}
    assert "text.mixer.in_proj.bias" in sorted_out(tensors, Model("model.mixer.in_proj"), config)


def test_what_a_decoded_linear_lacks_is_an_error(config):
    tensors = checkpoint()
    del tensors["text.mixer.in_proj.scales"]
    with pytest.raises(CheckpointError, match=r"text.mixer.in_proj has only channel_scales, pairs"):
        sorted_out(tensors, Model("model.mixer.in_proj"), config)


def test_another_quantization_is_left_alone():
    tensors = checkpoint()
    assert sorted_out(tensors, Model(), SimpleNamespace()).keys() == tensors.keys()


def test_a_head_that_vllm_has_no_layer_for_is_left_out_and_said(config, caplog):
    config.heads = {"lm_head"}
    head = {f"lm_head.{name}": tensor for name, tensor in PACKED["text.mlp.up_proj"].tensors.items()}
    with caplog.at_level("WARNING", "vllm.pairquant"):
        found = sorted_out(checkpoint() | head, Model("model.norm"), config)
    assert not any(name.startswith("lm_head") for name in found)
    assert "lm_head is quantized, but vLLM's model has no output embedding" in caplog.text
    config.claimed.add("lm_head")
    assert set(head) <= set(sorted_out(checkpoint() | head, Model("model.norm"), config))
    config.claimed.clear()
    config.quantized["lm_head"], config.stored_as["lm_head"] = SPEC, "lm_head"
    assert "lm_head.weight" in sorted_out(checkpoint() | head, Model("lm_head"), config), (
        "a plain layer gets it decoded"
    )


def test_packed_q_and_k_of_a_model_that_reorders_their_rows_are_refused(config):
    """Llama 4's loader turns the rows of plain weights alone: it would answer wrongly without an error."""
    model = torch.nn.Module()
    model.permute_qk_weight_for_rotary = lambda name, weight: (name, weight)
    assert not sorted_out({}, model, config)
    config.stored_as["model.layers.0.self_attn.q_proj"] = "text.layers.0.self_attn.q_proj"
    with pytest.raises(ConfigError, match=r"reorders the rows of text\.layers\.0\.self_attn\.q_proj.*--ignore q_proj"):
        sorted_out({}, model, config)
