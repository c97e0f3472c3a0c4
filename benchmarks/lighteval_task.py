"""Lighteval on our checkpoints: tasks over local files, and what makes Transformers know the format in Lighteval's process.

    PROBLEMS=DIR lighteval accelerate "model_name=MODEL-PARO" "local_choice,local_boxed" --custom-tasks benchmarks/lighteval_task.py

DIR holds `choice/test.jsonl` and `boxed/test.jsonl`, the latter as `pairquant eval --boxed` reads it:

    {"question": "Water boils at", "choices": [" 100 °C", " 10 °C"], "gold": 0}
    {"problem": "What is 6 times 7?", "answer": 42}

ANSWER_TOKENS is how long an answer may be, 1024 by itself. Lighteval's own tasks run in the same way, with this file only for its import of pairquant.
"""

import os
from pathlib import Path

from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc

import pairquant  # noqa: F401  # registers the format; Lighteval imports this file before it loads the model
from pairquant.evaluation.problems import INSTRUCTION

PROBLEMS = Path(os.environ.get("PROBLEMS", "problems"))
ANSWER_TOKENS = int(os.environ.get("ANSWER_TOKENS", "1024"))


def choice(row: dict, task_name: str) -> Doc:
    """The answer is the choice of the highest likelihood."""
    return Doc(task_name=task_name, query=row["question"], choices=row["choices"], gold_index=row["gold"])


def boxed(row: dict, task_name: str) -> Doc:
    r"""The answer is what is in the last \boxed{}."""
    query = f"{row.get('problem') or row['question']}\n\n{INSTRUCTION}"
    return Doc(task_name=task_name, query=query, choices=[str(row["answer"])], gold_index=0)


def over_files(name: str, **options) -> LightevalTaskConfig:
    """A task over PROBLEMS/name/test.jsonl."""
    return LightevalTaskConfig(
        name=f"local_{name}", hf_repo=str(PROBLEMS / name), hf_subset="default", hf_avail_splits=["test"],
        evaluation_splits=["test"], **options,
    )  # fmt: skip


TASKS_TABLE = [
    over_files("choice", prompt_function=choice, metrics=[Metrics.loglikelihood_acc]),
    over_files(
        "boxed",
        prompt_function=boxed,
        metrics=[Metrics.expr_gold_metric],
        generation_size=ANSWER_TOKENS,
        stop_sequence=[],  # without it Lighteval 0.13 adds a tuple to a list
    ),
]
