"""Speed and memory are computed from what an engine reports."""

import pytest
import torch

from pairquant.evaluation.speed import Generation, PeakMemory, Workload, measure, summarize
from pairquant.support.errors import ConfigError


class Scripted:
    """An engine that takes the times it is told to."""

    vocabulary, context = 50, 64

    def __init__(self, first_token_s=(), decode_s=()):
        self.times = [(9.0, 9.0), *zip(first_token_s, decode_s, strict=True)]  # the warm-up is slow
        self.asked = []

    def generate(self, prompts, new_tokens):
        first, decode = self.times[len(self.asked)]
        self.asked.append((prompts, new_tokens))
        batch = len(prompts)
        return Generation(torch.zeros(batch, new_tokens, dtype=torch.long), first, batch * (new_tokens - 1), decode)


def test_medians_over_the_repeats_without_the_warm_up():
    engine = Scripted([1.0, 4.0, 2.0], [0.5, 8.0, 1.0])
    speed = measure(engine, Workload((3,), prompt_tokens=10, new_tokens=5, repeats=3), 3)
    assert speed.batch == 3
    assert speed.first_token_s == 2.0
    assert speed.prefill_tokens_per_s == 3 * 10 / 2.0
    assert speed.decode_tokens_per_s == 3 * 4 / 1.0
    assert len(engine.asked) == 4


def test_tokens_that_came_before_the_last_first_token_are_not_counted_as_decoded():
    tokens = torch.zeros(2, 10, dtype=torch.long)
    assert summarize([Generation(tokens, 1.0, 12, 2.0)], 8).decode_tokens_per_s == 6.0


def test_prompts_are_the_same_for_the_same_seed_and_within_the_vocabulary():
    engine = Scripted([1.0], [1.0])
    workload = Workload((2,), prompt_tokens=40, new_tokens=4, repeats=1, seed=7)
    measure(engine, workload, 2)
    (first, count), (second, _) = engine.asked
    assert torch.equal(first, second)
    assert (first.shape, count) == ((2, 40), 4)
    assert 0 <= first.min() <= first.max() < 50
    other = Workload((2,), prompt_tokens=40, seed=8).prompts(2, 50)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batches": ()}, "batches are []"),
        ({"batches": (1, 0)}, "batches are [1, 0]"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0, allowed: 1 or more"),
        ({"new_tokens": 1}, "new_tokens is 1, allowed: 2 or more"),
        ({"repeats": 0}, "repeats is 0"),
    ],
)
def test_workloads_check_themselves(settings, message):
    with pytest.raises(ConfigError) as raised:
        Workload(**settings)
    assert message in str(raised.value)


def test_sequences_longer_than_the_context_are_refused_before_anything_runs():
    engine = Scripted()
    with pytest.raises(ConfigError, match="65, allowed: 64"):
        measure(engine, Workload(prompt_tokens=60, new_tokens=5), 1)
    assert engine.asked == []


def test_peak_memory_holds_what_was_allocated_and_freed():
    memory = PeakMemory(torch.device("cpu"))
    if memory.before is None:
        pytest.skip("the resident set is known on Linux only")
    block = torch.ones(96 * 2**20, dtype=torch.uint8)
    del block
    assert memory.bytes() >= 90 * 2**20
