"""Rows of results: a JSON line each in benchmarks/results/paper/<table>.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .experiments import ROOT, Case

RESULTS = ROOT / "benchmarks" / "results"


def read(table: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    file = results / "paper" / f"{table}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def find(table: str, model: str, recipe: str, results: Path = RESULTS) -> dict[str, Any] | None:
    """The row on the paper's calibration text before one on another."""
    found = [row for row in read(table, results) if (row["model"], row["recipe"]) == (model, recipe)]
    return min(found, key=lambda row: bool(row["calibration"]), default=None)


def key(case: Case) -> dict[str, Any]:
    return {"model": case.name, "recipe": case.recipe, "calibration": list(case.calibration)}


def exists(table: str, case: Case, results: Path = RESULTS) -> bool:
    return any(key(case).items() <= row.items() for row in read(table, results))


def append(table: str, row: dict[str, Any], results: Path = RESULTS) -> None:
    file = results / "paper" / f"{table}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")
