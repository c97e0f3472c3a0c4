"""A checkpoint's log (`pairquant.jsonl`), read back: what each block took, and how its training went."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..support.errors import CheckpointError

LOG_FILE = "pairquant.jsonl"
REMEDY = "The model runs without this file: delete it for a report without times and loss curves."


@dataclass(frozen=True)
class Epoch:
    """Of block-wise training. loss: None before the first step; validation: on the windows held out."""

    stage: int
    epoch: int
    loss: float | None
    validation: float


@dataclass(frozen=True)
class BlockRecord:
    """A finished block. seconds: it took; gpu_peak: most GPU memory allocated until then, bytes, 0 on a CPU."""

    index: int
    seconds: float
    gpu_peak: int
    history: tuple[Epoch, ...]


def read_log(directory: Path) -> list[BlockRecord]:
    """Return the blocks in order, of a checkpoint's directory; none without a log. Raises `CheckpointError` naming a bad line."""
    file = directory / LOG_FILE
    if not file.is_file():
        return []
    blocks = {}
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        try:
            event = json.loads(line)
            if event["event"] == "block":
                record = _record(event)
                blocks[record.index] = record  # a run that was started anew repeats blocks: the last counts
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"{file}, line {number} is no event of a run ({error!r}). {REMEDY}") from error
    return [blocks[index] for index in sorted(blocks)]


def _record(event: dict[str, Any]) -> BlockRecord:
    history = tuple(
        Epoch(int(e["stage"]), int(e["epoch"]), None if e["loss"] is None else float(e["loss"]), float(e["validation"]))
        for e in event.get("history", ())
    )
    return BlockRecord(int(event["index"]), float(event["seconds"]), int(event.get("gpu_peak", 0)), history)
