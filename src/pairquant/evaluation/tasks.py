"""Tasks of lm-eval, on a loaded model or on vLLM."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..support.devices import current
from ..support.errors import ConfigError, TextError, did_you_mean
from .reasoning import Paired, compare

#: Requests that vLLM is given at once; how many of them run at once is its own matter.
VLLM_BATCH = 1024


@dataclass(frozen=True)
class TaskPlan:
    """names: lm-eval's, or of YAML files in `directory`; limit: questions of each task, None for all; batch: questions at once."""

    names: tuple[str, ...]
    directory: Path | None = None
    limit: int | None = None
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `ConfigError`."""
        if self.directory is not None and not self.directory.is_dir():
            raise ConfigError(f"task directory {str(self.directory)!r} does not exist")
        if self.batch < 1 or (self.limit is not None and self.limit < 1):
            raise ConfigError(f"batch is {self.batch}, limit of questions {self.limit}, allowed: 1 or more")


@dataclass(frozen=True)
class Metric:
    """stderr: None where lm-eval gives none; outcomes: question by question, None unless they are right or wrong."""

    value: float
    stderr: float | None
    outcomes: list[bool] | None


#: Task → metric → what came out.
Metrics = dict[str, dict[str, Metric]]


class Tasks:
    """What a plan names, found, and its data sets read.

    Raises `ConfigError` for names that do not exist, and without lm-eval; `TextError` when a data set cannot be read.
    """

    def __init__(self, plan: TaskPlan):
        if find_spec("lm_eval") is None:
            raise ConfigError("tasks are run by lm-eval, which is not installed. Run: pip install 'pairquant[eval]'")
        from lm_eval import __version__

        self.version = __version__
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.plan = plan
        self.manager = _manager(plan)
        for name in plan.names:
            if not self.manager.match_tasks([name]):
                hint = did_you_mean(name, self.manager.all_tasks)
                raise ConfigError(
                    f"task is {name!r}, allowed: those that `lm-eval ls tasks` lists, and --task-dir's{hint}"
                )
        try:
            self.manager.load(list(plan.names))
        except (OSError, ImportError, ValueError) as error:
            raise TextError(
                f"the data of tasks {', '.join(plan.names)} cannot be read: {type(error).__name__}: {error}\n"
                "  lm-eval's own tasks come from the hub; tasks over local files are found by --task-dir."
            ) from error

    def run(self, model: Any, tokenizer: Any) -> Metrics:
        """Return every task and subtask, on a model of Transformers."""
        from lm_eval.models.huggingface import HFLM

        with current(model.device):
            return self.examine(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.plan.batch))

    def vllm(self, arguments: Mapping[str, Any]) -> Any:
        """Return a model that lm-eval loads into vLLM, in this process, for `examine`. arguments: of vLLM's `LLM`."""
        from lm_eval.models.vllm_causallms import VLLM

        options = {name: value for name, value in arguments.items() if name != "model"}
        return VLLM(pretrained=arguments["model"], batch_size=VLLM_BATCH, seed=self.plan.seed, **options)

    def examine(self, subject: Any) -> Metrics:
        """Return every task and subtask. subject: lm-eval's `LM`."""
        from lm_eval import simple_evaluate

        plan = self.plan
        for request in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(subject, request, partial(getattr(subject, request), disable_tqdm=True))
        seeds = {f"{part}_random_seed": plan.seed for part in ("numpy", "torch", "fewshot")}
        found = simple_evaluate(
            model=subject, tasks=list(plan.names), limit=plan.limit, task_manager=self.manager, random_seed=plan.seed,
            **seeds,
        )  # fmt: skip
        samples = found.get("samples", {})
        return {task: _metrics(row, samples.get(task, [])) for task, row in found["results"].items()}


def _manager(plan: TaskPlan) -> Any:
    """Return lm-eval's `TaskManager`, for the directory alone if that has all tasks: lm-eval's own 14,000 entries take nine seconds."""
    from lm_eval.tasks import TaskManager

    if plan.directory is None:
        return TaskManager()
    local = TaskManager(include_path=str(plan.directory), include_defaults=False)
    return local if set(plan.names) <= set(local.all_subtasks) else TaskManager(include_path=str(plan.directory))


def paired(ours: Metrics, theirs: Metrics, seed: int = 0) -> dict[str, dict[str, Paired]]:
    """Task → metric → the model against the reference, where questions are right or wrong."""
    found: dict[str, dict[str, Paired]] = {}
    for task, metrics in ours.items():
        for name, metric in metrics.items():
            expected = theirs[task][name].outcomes
            if metric.outcomes and expected:
                found.setdefault(task, {})[name] = compare(metric.outcomes, expected, seed)
    return found


def _metrics(row: Mapping[str, Any], samples: list[dict[str, Any]]) -> dict[str, Metric]:
    """Read lm-eval's {"acc,none": value, "acc_stderr,none": value, …}: "acc", or "acc,strict" under a filter's name."""
    found = {}
    for key, value in row.items():
        name, comma, kept = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = row.get(f"{name}_stderr,{kept}")
        outcomes = _outcomes([sample for sample in samples if sample["filter"] == kept], name)
        found[name if kept == "none" else key] = Metric(
            float(value), float(stderr) if isinstance(stderr, (int, float)) else None, outcomes
        )
    return found


def _outcomes(samples: list[dict[str, Any]], metric: str) -> list[bool] | None:
    values = [sample.get(metric) for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    return [bool(value) for value in values] if values and all(value in (0, 1) for value in values) else None
