"""Which class a model is, and whether it is one that can be quantized."""

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BartConfig, BertConfig, LlamaConfig

from pairquant.checkpoint.architecture import (
    auto_class,
    expected_fields,
    require_decoder_only,
    require_named_class,
    require_one_tensor_a_name,
)
from pairquant.support.errors import SourceError


def test_decoders_are_built_by_the_class_for_causal_models():
    assert auto_class(LlamaConfig(architectures=["LlamaForCausalLM"])) is AutoModelForCausalLM
    assert auto_class(LlamaConfig(architectures=["SomethingOfTheirOwn"])) is AutoModelForCausalLM


def test_encoders_with_decoders_are_refused():
    with pytest.raises(SourceError, match=r"encoder-decoder model \(BartForConditionalGeneration\)"):
        require_decoder_only(BartConfig(architectures=["BartForConditionalGeneration"]), "bart")
    require_decoder_only(LlamaConfig(), "llama")


def test_a_model_must_be_of_the_class_that_its_files_name():
    model = tiny_model()
    require_named_class(model.config, model, "tiny")
    older = LlamaConfig(architectures=["LLaMAForCausalLM"])  # a spelling of old files
    require_named_class(older, model, "tiny")
    with pytest.raises(SourceError, match="is a BertForMaskedLM, .* another kind of model"):
        require_named_class(BertConfig(architectures=["BertForMaskedLM"]), model, "bert")


def test_tied_tensors_are_expected_once():
    tied = expected_fields(tiny_model("qwen3"))
    assert "model.embed_tokens.weight" in tied
    assert "lm_head.weight" not in tied
    model = tiny_model("llama")
    assert expected_fields(model)["lm_head.weight"].shape == tuple(model.lm_head.weight.shape)


def test_a_gguf_of_experts_is_refused_and_convolutions_are_no_experts():
    require_one_tensor_a_name(nn.Conv1d(4, 4, 3), "conv.gguf")
    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.empty(4, 8, 8))
    with pytest.raises(SourceError, match=r"GGUF file of a model with experts \(.*gate_up_proj"):
        require_one_tensor_a_name(experts, "moe.gguf")
