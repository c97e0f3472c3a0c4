"""Problems with answers: the bundled GSM8K test problems, and files of the user's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..support.errors import ConfigError, TextError
from ..support.rows import ROW_READERS, rows_of
from ..support.text import BUNDLED_TEST
from ..support.windows import SURROGATES

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
    """Return the first `count` test problems, the same for all models. Raises `ConfigError`."""
    text = (resources.files("pairquant") / "data" / Path(BUNDLED_TEST).name).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    if not 1 <= count <= len(rows):
        raise ConfigError(f"the number of GSM8K problems is {count}, allowed: 1 to {len(rows)}")
    return [Problem(row["question"], row["answer"].rpartition("####")[2].strip()) for row in rows[:count]]


def from_file(path: Path) -> list[Problem]:
    """Return rows of JSON lines, JSON or CSV with "problem" or "question", and "answer"; raises `TextError`."""
    if not path.is_file():
        raise TextError(f"problem file {str(path)!r} does not exist")
    if path.suffix.lower() not in ROW_READERS:
        raise TextError(f"problem file {str(path)!r} ends in {path.suffix!r}, allowed: {', '.join(ROW_READERS)}")
    problems = [_problem(row, where) for where, row in rows_of(path)]
    if not problems:
        raise TextError(f"problem file {str(path)!r} holds no problems")
    return problems


def _problem(row: Any, where: str) -> Problem:
    fields = row if isinstance(row, dict) else {}
    question, answer = fields.get("problem", fields.get("question")), fields.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool):  # AIME's
        answer = str(answer)
    if not isinstance(question, str) or not isinstance(answer, str):
        keys = sorted(fields) if isinstance(row, dict) else type(row).__name__
        raise TextError(f"{where}: needs texts 'problem' or 'question', and 'answer'; it has {keys}")
    if SURROGATES.search(question + answer):
        raise TextError(f"{where}: half of a character (a lone surrogate) is in it. Take it out.")
    return Problem(question, answer)
