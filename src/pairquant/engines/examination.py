"""Has a model answer problems and run tasks: with Transformers in this process, or with vLLM in one of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..checkpoint.read import ModelFiles
from ..evaluation.generation import Continuation, generate
from ..evaluation.reasoning import AnswerPlan
from ..evaluation.tasks import Metrics, TaskPlan, Tasks
from ..support.processes import in_own_process
from .engine import EngineOptions

#: Set of problems → each prompt's token ids.
Prompts = Mapping[str, Sequence[list[int]]]


@dataclass(frozen=True)
class Questions:
    """Holds what to ask: sets of problems, to be answered as `plan` says, and lm-eval's tasks, or None."""

    sets: Prompts
    plan: AnswerPlan
    tasks: Tasks | None


@dataclass(frozen=True)
class Answered:
    """Holds each set's continuations, in the order of its prompts, and the tasks' metrics, None without tasks."""

    sets: dict[str, list[Continuation]]
    tasks: Metrics | None


class Examinee(Protocol):
    """Answers questions: a model on an engine."""

    def examine(self, questions: Questions, step: Callable[[str], None]) -> Answered:
        """Answer all; calls `step` with a set's name after each of its prompts, and with "tasks" after the tasks."""
        ...


@dataclass(frozen=True)
class OnTransformers:
    """Answers with a model that Transformers has loaded into this process."""

    model: Any
    tokenizer: Any

    def examine(self, questions: Questions, step: Callable[[str], None]) -> Answered:
        plan, found = questions.plan, {}
        for name, prompts in questions.sets.items():
            found[name] = generate(
                self.model, prompts, plan.tokens, plan.options, batch=plan.batch, seed=plan.seed,
                on_prompt=lambda name=name: step(name),  # type: ignore[misc]
            )  # fmt: skip
        metrics = questions.tasks.run(self.model, self.tokenizer) if questions.tasks else None
        if metrics:
            step("tasks")
        return Answered(found, metrics)


@dataclass(frozen=True)
class OnVllm:
    """Answers with vLLM in a process of its own. dtype: of the activations."""

    name: str
    trust_remote_code: bool
    device: str
    dtype: str

    def examine(self, questions: Questions, step: Callable[[str], None]) -> Answered:
        sets, plan, tasks = questions.sets, questions.plan, questions.tasks
        prompts = [len(prompt) for prompts in sets.values() for prompt in prompts]
        longest = max(prompts) + plan.tokens if prompts else None
        options = EngineOptions(
            self.device, self.dtype, sequences=plan.batch if prompts else 1, sequence_tokens=longest,
            any_length=tasks is not None,
        )  # fmt: skip
        job = VllmJob(self.name, self.trust_remote_code, options, sets, plan, tasks.plan if tasks else None)
        found = in_own_process(examine_on_vllm, job, step, "--batch or --answer-tokens")
        return Answered(found["sets"], found["tasks"])


@dataclass(frozen=True)
class VllmJob:
    """Holds what such a process is told: `model` by name, and the parts of `Questions` that can be sent."""

    model: str
    trust_remote_code: bool
    options: EngineOptions
    sets: Prompts
    plan: AnswerPlan
    tasks: TaskPlan | None


def examine_on_vllm(job: VllmJob) -> Iterator[str | dict[str, Any]]:
    """Yield the names that `Examinee.examine` tells its `step`, and at the end {"sets", "tasks"} as in `Answered`."""
    from .vllm import LLM, NamedVllm, VllmEngine

    tasks = Tasks(job.tasks) if job.tasks else None
    subjects = []

    def load(**arguments: Any) -> LLM:
        if tasks is None:
            return LLM(**arguments)
        sys.meta_path.append(NamedVllm())
        subjects.append(tasks.vllm(arguments))
        return subjects[0].model

    engine = VllmEngine(ModelFiles.find(job.model, job.trust_remote_code), job.options, load)
    found: dict[str, dict[int, Continuation]] = {name: {} for name in job.sets}
    for name, prompts in job.sets.items():
        for number, continuation in engine.answer(prompts, job.plan):
            found[name][number] = continuation
            yield name
    metrics = tasks.examine(subjects[0]) if tasks else None
    if metrics:
        yield "tasks"
    yield {"sets": {name: [row[number] for number in sorted(row)] for name, row in found.items()}, "tasks": metrics}
