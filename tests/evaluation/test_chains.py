"""Chains are the original's own; a model that is the original neither diverges nor departs."""

import pytest
import torch
from tiny_models import tiny_model

from pairquant.evaluation.chains import ChainPlan, measure, sample
from pairquant.evaluation.generation import GREEDY, SAMPLED, Continuation, generate
from pairquant.evaluation.quality import score
from pairquant.support.errors import ConfigError

PROMPTS = [[5, 9, 11], [40, 41, 42, 43, 44, 45], [7]]


@pytest.fixture(scope="module")
def models():
    return tiny_model(seed=1), tiny_model(seed=0)


def damaged(reference, amount):
    model = tiny_model(seed=0)
    model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=amount)
    return model


def test_the_original_neither_diverges_nor_departs(models):
    _, reference = models
    found = measure(reference, reference, sample(reference, PROMPTS, ChainPlan(3, tokens=12)))
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.departures == [None] * 3
    assert found.departure_median is None
    assert found.never_departed == 1


def test_divergence_is_that_of_each_chain_scored_alone(models):
    model, reference = models
    sampling, measuring = [], []
    sampled = sample(reference, PROMPTS, ChainPlan(3, tokens=12, seed=4), on_chain=lambda: sampling.append(1))
    found = measure(model, reference, sampled, on_chain=lambda: measuring.append(1))
    assert len(sampling) == len(measuring) == 2 * 3
    chains = generate(reference, PROMPTS, 12, SAMPLED, seed=4)
    assert found.tokens_of_chains == [len(chain.tokens) for chain in chains]
    assert found.tokens == sum(found.tokens_of_chains)
    for prompt, chain, kl in zip(PROMPTS, chains, found.kl_of_chains, strict=True):
        whole = score(model, torch.tensor([*prompt, *chain.tokens]), reference).kl
        assert kl == pytest.approx(whole[len(prompt) - 1 :].mean().item(), rel=1e-4)
    low, high = found.kl_interval
    assert low < found.kl < high
    assert found.kl_by_position[0]["start"] == 0


def test_departures_are_where_the_two_greedy_decodings_differ(models):
    _, reference = models
    model = damaged(reference, 0.001)
    found = measure(model, reference, sample(reference, PROMPTS, ChainPlan(3, tokens=24)))
    ours, theirs = (generate(network, PROMPTS, 24, GREEDY, batch=1) for network in (model, reference))
    for departure, a, b in zip(found.departures, ours, theirs, strict=True):
        a, b = a.tokens, b.tokens
        same = next((i for i in range(min(len(a), len(b))) if a[i] != b[i]), None)
        assert departure == same
    assert {departure is None for departure in found.departures} == {True, False}
    assert found.never_departed == found.departures.count(None) / 3


def test_sampling_is_seeded_leaves_the_global_state_alone_and_does_not_depend_on_recommendations(models):
    _, reference = models
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    first = generate(reference, PROMPTS, 10, SAMPLED, seed=1)
    assert torch.rand(1) == expected
    reference.generation_config.top_k, before = 1, reference.generation_config.top_k
    again = generate(reference, PROMPTS, 10, SAMPLED, seed=1)
    reference.generation_config.top_k = before
    assert first == again
    other = generate(reference, PROMPTS, 10, SAMPLED, seed=2)
    assert first != other


def test_continuations_do_not_depend_on_what_else_is_in_the_batch(models):
    model, _ = models
    together = generate(model, PROMPTS, 9, GREEDY, batch=3)
    alone = generate(model, PROMPTS, 9, GREEDY, batch=1)
    assert together == alone


def test_a_continuation_ends_with_its_first_end_of_text(models):
    model, _ = models
    (whole,) = generate(model, PROMPTS[:1], 8, GREEDY)
    end = whole.tokens[2]
    model.generation_config.eos_token_id, before = [250, end], model.generation_config.eos_token_id
    (cut, _) = generate(model, PROMPTS[:2], 8, GREEDY)
    model.generation_config.eos_token_id = before
    assert cut == Continuation(whole.tokens[: whole.tokens.index(end) + 1], finished=True)
    assert not whole.finished


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "number of chains is 0, allowed: 1 or more"),
        ({"count": 1, "tokens": 4097}, "tokens of a chain are 4097, allowed: 1 to 4096"),
        ({"count": 1, "batch": 0}, "batch is 0"),
    ],
)
def test_plans_check_themselves(settings, message):
    with pytest.raises(ConfigError) as raised:
        ChainPlan(**settings)
    assert message in str(raised.value)
