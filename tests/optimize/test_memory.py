"""Memory is predicted before the work begins, and streams that the GPU has no room for stay on the host."""

from dataclasses import replace

import pytest
import torch
from families import DENSE, FAMILIES
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, MixtralConfig

from pairquant.models.blocks import find_blocks, head_block
from pairquant.optimize.head import CHUNK_NUMBERS
from pairquant.optimize.memory import MARGIN, REFITTED_COPIES, demand
from pairquant.spec.options import QuantConfig
from pairquant.spec.recipe import PRESETS, EndToEnd, HeadTraining

CUDA = torch.device("cuda")


@pytest.fixture
def predicted(monkeypatch):
    """(preset, windows, free bytes) → the demand on a GPU of which nothing but its free memory is asked."""
    model = tiny_model(dtype=torch.bfloat16)
    blocks = find_blocks(model)

    def predict(preset="fast", windows=4, free=10**12):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
        config = QuantConfig(preset=preset, group_size=64)
        tokens = torch.zeros(windows, 4096, dtype=torch.int64)
        return demand(model, blocks, config, tokens, None, CUDA)

    return predict


def test_streams_cost_what_their_elements_do(predicted):
    few, many = predicted(windows=4), predicted(windows=8)
    assert many.streams - few.streams == 4 * 4096 * 128 * 2 * 2  # windows, tokens, hidden, bfloat16, two streams
    assert many.device - few.device == many.streams - few.streams


def test_training_the_output_embedding_holds_copies_of_it_a_few_logits_and_a_stream_in_one_piece(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
    model, tokens = tiny_model(dtype=torch.bfloat16), torch.zeros(4, 4096, dtype=torch.int64)
    head = [*find_blocks(model), head_block(model)]
    untrained = QuantConfig(group_size=64, head_bits=4)
    config = replace(untrained, recipe=replace(untrained.recipe, head=HeadTraining()))
    trained, plain = (demand(model, head, c, tokens, None, CUDA).device for c in (config, untrained))
    least = CHUNK_NUMBERS * 4 + 288 * 128 * 4 * 5 + 4 * 4096 * 128 * 2  # the vocabulary, hidden, bfloat16
    assert trained - plain > MARGIN * least
    model.get_input_embeddings().weight.data = torch.zeros(10**6, 128, dtype=torch.bfloat16)
    larger = demand(model, head, config, tokens, None, CUDA).device
    assert larger - trained == pytest.approx(MARGIN * (10**6 - 288) * 128 * 2, abs=10), "it is on the GPU as well"


def test_one_stream_suffices_without_comparison(predicted):
    assert predicted("quick").streams * 2 == predicted("fast").streams


def test_streams_without_room_stay_on_the_host(predicted):
    ample = predicted(windows=64)
    assert ample.store == CUDA
    scarce = predicted(windows=64, free=ample.device - ample.streams // 2)
    assert scarce.store == torch.device("cpu")
    assert scarce.device == ample.device - ample.streams


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_prediction(predicted, preset):
    assert predicted(preset).device > 0


def test_all_tokens_for_every_expert_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
    model = AutoModelForCausalLM.from_config(FAMILIES["Mixtral"].build())
    blocks, tokens = find_blocks(model), torch.zeros(4, 4096, dtype=torch.int64)

    def predicted(all_experts):
        config = QuantConfig(group_size=32, all_experts=all_experts)
        return demand(model, blocks, config, tokens, None, CUDA).device / MARGIN

    one_expert = 8192 * (2 * 64 + 64) * (4 + 4)  # tokens; gate and up, then what down reads; as computed and in float32
    fewer_sums = 3 * 64 * 64 * 4 * 2  # one matrix for gate and up of all four experts, and its product
    assert predicted(True) - predicted(False) == pytest.approx(one_expert - fewer_sums, abs=10)


@pytest.mark.parametrize("preset", ["best", "paper"])
def test_training_a_block_counts_its_experts(monkeypatch, preset):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))

    def predicted(experts):
        config = MixtralConfig(**DENSE | {"intermediate_size": 1024, "hidden_size": 512}, num_local_experts=experts)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tokens = torch.zeros(1, 8, dtype=torch.int64)
        return demand(model, find_blocks(model), QuantConfig(preset=preset), tokens, None, CUDA).device

    one_expert = 3 * 512 * 1024 * 4  # bytes in float32
    assert predicted(16) - predicted(8) > 8 * one_expert * REFITTED_COPIES


def test_training_the_whole_model_counts_all_codes_and_the_logits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
    model = tiny_model(dtype=torch.bfloat16)
    blocks, tokens = find_blocks(model), torch.zeros(2, 64, dtype=torch.int64)

    def predicted(vocabulary=288, **options):
        model.config.vocab_size = vocabulary
        recipe = replace(PRESETS["rtn"], **options)
        return demand(model, blocks, QuantConfig(recipe=recipe, group_size=64), tokens, None, CUDA).device

    weights = sum(site.size.in_features * site.size.out_features for block in blocks for site in block.sites.values())
    assert predicted(end_to_end=EndToEnd()) > predicted() + weights
    assert predicted(10**7, end_to_end=EndToEnd()) > 64 * 10**7 * 4 * 2
