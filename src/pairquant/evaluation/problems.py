"""Problems with answers: the bundled GSM8K test problems, and files of the user's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..support.errors import ConfigError, TextError
from ..support.text import BUNDLED_TEST

#: Asks for an answer that a grader finds.
INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."


@dataclass(frozen=True)
class Problem:
    """answer: the expected one, without its derivation."""

    question: str
    answer: str

    @property
    def request(self) -> str:
        """What a model is asked."""
        return f"{self.question}\n\n{INSTRUCTION}"


def gsm8k(count: int) -> list[Problem]:
    """The first `count` test problems, the same for all models. Raises `ConfigError`."""
    text = (resources.files("pairquant") / "data" / Path(BUNDLED_TEST).name).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    if not 1 <= count <= len(rows):
        raise ConfigError(f"the number of GSM8K problems is {count}, allowed: 1 to {len(rows)}")
    return [Problem(row["question"], row["answer"].rpartition("####")[2].strip()) for row in rows[:count]]


def from_file(path: Path) -> list[Problem]:
    """Lines of JSON with "problem" or "question", and "answer"; raises `TextError`."""
    if not path.is_file():
        raise TextError(f"problem file {str(path)!r} does not exist")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    problems = list(_problems(lines, path))
    if not problems:
        raise TextError(f"problem file {str(path)!r} holds no problems")
    return problems


def _problems(lines: Iterable[str], path: Path) -> Iterable[Problem]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TextError(f"{path}, line {number}: not JSON ({error.msg})") from error
        yield _problem(row, f"{path}, line {number}")


def _problem(row: Any, where: str) -> Problem:
    fields = row if isinstance(row, dict) else {}
    question, answer = fields.get("problem", fields.get("question")), fields.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool):  # AIME's
        answer = str(answer)
    if not isinstance(question, str) or not isinstance(answer, str):
        keys = sorted(fields) if isinstance(row, dict) else type(row).__name__
        raise TextError(f"{where}: needs texts 'problem' or 'question', and 'answer'; it has {keys}")
    return Problem(question, answer)
