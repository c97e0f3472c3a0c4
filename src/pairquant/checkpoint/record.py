"""The record beside a checkpoint's weights, pairquant.json: recipe, provenance, errors and sizes of every linear."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

from ..support.errors import CheckpointError
from .files import read_json

#: Written beside the weights.
REPORT_FILE = "pairquant.json"
#: Its entry for a training of the whole model: the divergence, on calibration text that it held out, before it and after each epoch.
END_TO_END = "end_to_end_kl"
#: Its entry in a model that `fold` wrote: what was folded into which source.
FOLDED = "folded"
WITHOUT_REPORT = "The model runs without this file: delete it to go on without the recorded errors."


def read_record(file: Path) -> dict[str, Any]:
    """Read pairquant.json; empty if there is none.

    Raises `CheckpointError` for entries that readers rely on and that are something else than they should be.
    """
    if not file.is_file():
        return {}
    report = read_json(file)
    linears = report.get("linears", {})
    if not isinstance(linears, dict) or not all(_recorded(entry) for entry in linears.values()):
        raise CheckpointError(f"{file}: linears has an entry that is no record of a linear. {WITHOUT_REPORT}")
    if not isinstance(report.get("seconds", 0), (int, float)):
        raise CheckpointError(f"{file}: seconds is {reprlib.repr(report['seconds'])}, no number. {WITHOUT_REPORT}")
    curve = report.get(END_TO_END, [0])
    if not isinstance(curve, list) or not curve or not all(isinstance(value, (int, float)) for value in curve):
        raise CheckpointError(f"{file}: {END_TO_END} is {reprlib.repr(curve)}, no list of numbers. {WITHOUT_REPORT}")
    return report


def _recorded(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("error"), (int, float, type(None)))
