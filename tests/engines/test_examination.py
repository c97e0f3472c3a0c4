"""Questions are answered by a model that is loaded here, or handed to a process that runs vLLM."""

import pytest
from tiny_models import byte_tokenizer, tiny_model

from pairquant.engines import examination
from pairquant.engines.examination import OnTransformers, OnVllm, Questions
from pairquant.evaluation.generation import GREEDY, generate
from pairquant.evaluation.reasoning import AnswerPlan

SETS = {"sums": [[5, 9, 44], [17, 3, 8]], "words": [[70, 80]]}
PLAN = AnswerPlan(4, temperature=0, batch=2)


class FakeTasks:
    """Stands for lm-eval's tasks."""

    plan = "the plan"

    def run(self, model, tokenizer):
        return {"task": {"acc": 0.5}}


def test_transformers_answers_every_set_and_tells_each_step():
    model, steps = tiny_model(), []
    found = OnTransformers(model, byte_tokenizer()).examine(Questions(SETS, PLAN, FakeTasks()), steps.append)
    assert steps == ["sums", "sums", "words", "tasks"]
    assert found.tasks == {"task": {"acc": 0.5}}
    for name, prompts in SETS.items():
        expected = generate(model, prompts, 4, GREEDY)
        assert [each.tokens for each in found.sets[name]] == [each.tokens for each in expected]


def test_without_tasks_there_are_no_metrics():
    assert OnTransformers(tiny_model(), byte_tokenizer()).examine(Questions({}, PLAN, None), print).tasks is None


@pytest.mark.parametrize(
    ("sets", "tasks", "room"),
    [
        (SETS, None, (2, 3 + 4, False)),  # the longest prompt and its answer
        (SETS, FakeTasks(), (2, 3 + 4, True)),
        ({}, FakeTasks(), (1, None, True)),
    ],
)
def test_vllm_is_told_how_much_room_its_cache_needs(monkeypatch, sets, tasks, room):
    jobs = []

    def process(work, job, tell, remedy):
        jobs.append(job)
        assert work is examination.examine_on_vllm
        assert "--answer-tokens" in remedy
        return {"sets": {name: [] for name in job.sets}, "tasks": None}

    monkeypatch.setattr(examination, "in_own_process", process)
    found = OnVllm("q4", False, "cpu", "bfloat16").examine(Questions(sets, PLAN, tasks), print)
    assert found.sets == {name: [] for name in sets}
    (job,) = jobs
    assert (job.options.sequences, job.options.sequence_tokens, job.options.any_length) == room
    assert (job.model, job.options.dtype, job.tasks) == ("q4", "bfloat16", tasks and "the plan")
