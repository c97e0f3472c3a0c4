"""Continuations in batches are those of each prompt alone; they end where the model ends them."""

import pytest
import torch
from tiny_models import tiny_model

from pairquant.evaluation.generation import SAMPLED, check_context, generate
from pairquant.support.errors import ConfigError

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14]]


@pytest.fixture(scope="module")
def model():
    return tiny_model().float().eval()


def test_prompts_of_different_lengths_in_a_batch_continue_as_alone(model):
    alone = [generate(model, [prompt], 6)[0] for prompt in PROMPTS]
    assert generate(model, PROMPTS, 6, batch=4) == alone
    assert generate(model, PROMPTS, 6, batch=3) == alone


def test_sampling_is_seeded_and_leaves_the_global_state_alone(model):
    state = torch.random.get_rng_state()
    first = generate(model, PROMPTS, 8, SAMPLED, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert generate(model, PROMPTS, 8, SAMPLED, seed=1) == first
    assert generate(model, PROMPTS, 8, SAMPLED, seed=2) != first


def test_a_continuation_ends_with_the_first_end_token(model):
    free = generate(model, PROMPTS[:1], 6)[0]
    assert not free.finished
    assert len(free.tokens) == 6
    end = free.tokens[3]
    place = free.tokens.index(end)
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, [end]
    try:
        found = generate(model, PROMPTS[:1], 6)[0]
    finally:
        model.generation_config.eos_token_id = before
    assert found.finished
    assert found.tokens == free.tokens[: place + 1]


def test_every_prompt_is_told_of(model):
    told = []
    generate(model, PROMPTS, 2, batch=3, on_prompt=lambda: told.append(1))
    assert len(told) == len(PROMPTS)


def test_what_does_not_fit_the_context_is_refused_with_what_would():
    check_context(PROMPTS, 4, 8, "--answer-tokens")
    check_context(PROMPTS, 10**9, None, "--answer-tokens")
    with pytest.raises(ConfigError, match="--answer-tokens is 5, allowed: 4"):
        check_context(PROMPTS, 5, 8, "--answer-tokens")
