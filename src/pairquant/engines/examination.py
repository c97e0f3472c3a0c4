"""Problems answered and tasks run: by a model of Transformers that is loaded here, or by vLLM in processes of its own."""

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
    """sets: of problems, answered as `plan` says; tasks: lm-eval's, or none."""

    sets: Prompts
    plan: AnswerPlan
    tasks: Tasks | None


@dataclass(frozen=True)
class Answered:
    """Of each set of problems its continuations, in order; of the tasks what came out, if there were any."""

    sets: dict[str, list[Continuation]]
    tasks: Metrics | None


class Examinee(Protocol):
    """A model on an engine."""

    def examine(self, questions: Questions, step: Callable[[str], None]) -> Answered:
        """`step` is given the name of a set after each of its prompts, and "tasks" after them."""
        ...


@dataclass(frozen=True)
class OnTransformers:
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
    """In a process of its own. dtype: of the activations."""

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
    """What a process does."""

    model: str
    trust_remote_code: bool
    options: EngineOptions
    sets: Prompts
    plan: AnswerPlan
    tasks: TaskPlan | None


def examine_on_vllm(job: VllmJob) -> Iterator[str | dict[str, Any]]:
    """Names as `Examinee.examine` tells them, at the end {"sets", "tasks"} as in `Answered`."""
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
