"""Problems answered in full and graded, alone and against the original's answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..support.errors import ConfigError
from .generation import GREEDY, Continuation, generate
from .statistics import Interval, bootstrap_mean, mcnemar, probability_no_worse, wilson


@dataclass(frozen=True)
class AnswerPlan:
    """How problems are answered.

    tokens: of an answer at the most; batch: answers at once; temperature: 0 is greedy, else top-p and top-k are what the
    model recommends (its generation_config.json).
    """

    tokens: int = 1024
    batch: int = 8
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `ConfigError`."""
        if self.tokens < 1 or self.batch < 1:
            raise ConfigError(f"tokens are {self.tokens}, batch is {self.batch}, allowed: 1 or more")
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"temperature is {self.temperature}, allowed: 0 to 2")

    @property
    def options(self) -> dict[str, Any]:
        return {"do_sample": True, "temperature": self.temperature} if self.temperature else dict(GREEDY)


@dataclass(frozen=True)
class Answers:
    """Of one model. interval: Wilson's, 95 %; finished: share that ended within the plan's tokens; tokens: mean length;
    outcomes: right or wrong, problem by problem.
    """

    problems: int
    correct: int
    accuracy: float
    interval: Interval
    finished: float
    tokens: float
    outcomes: list[bool]


@dataclass(frozen=True)
class Paired:
    """A model's outcomes against the reference's on the same problems.

    lost, gained: right in the reference only, in the model only; difference: of the accuracies, with its 95 % interval by
    bootstrap over problems, None for a single one; p_value: McNemar's exact test, two-sided; no_worse: probability that
    the model is no worse, see `statistics.probability_no_worse`.
    """

    lost: int
    gained: int
    difference: float
    interval: Interval | None
    p_value: float
    no_worse: float


def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    is_right: Callable[[int, str], bool],
    plan: AnswerPlan,
    on_answer: Callable[[], None] | None = None,
) -> Answers:
    """Answer the prompts' token ids; `is_right(problem number, answer's text)` grades."""
    found = generate(
        model, prompts, plan.tokens, plan.options, batch=plan.batch, seed=plan.seed, on_prompt=on_answer
    )  # fmt: skip
    return grade(found, tokenizer, is_right)


def grade(found: Sequence[Continuation], tokenizer: Any, is_right: Callable[[int, str], bool]) -> Answers:
    """Grade continuations that an engine has made; `is_right` is called with the number of the problem and the answer."""
    texts = tokenizer.batch_decode([each.tokens for each in found], skip_special_tokens=True)
    outcomes = [is_right(number, text) for number, text in enumerate(texts)]
    correct, count = sum(outcomes), len(outcomes)
    return Answers(
        problems=count,
        correct=correct,
        accuracy=correct / count,
        interval=wilson(correct, count),
        finished=sum(each.finished for each in found) / count,
        tokens=sum(len(each.tokens) for each in found) / count,
        outcomes=outcomes,
    )


def compare(outcomes: Sequence[bool], expected: Sequence[bool], seed: int = 0) -> Paired:
    """Return the model's outcomes with the reference's, on the same problems."""
    changes = [float(ours) - float(theirs) for ours, theirs in zip(outcomes, expected, strict=True)]
    lost, gained = changes.count(-1.0), changes.count(1.0)
    return Paired(
        lost,
        gained,
        sum(changes) / len(changes),
        bootstrap_mean(changes, seed=seed),
        mcnemar(lost, gained),
        probability_no_worse(lost, gained),
    )
