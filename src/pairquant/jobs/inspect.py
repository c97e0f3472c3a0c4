"""What a packed checkpoint holds, with every tensor checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.read import Checkpoint, ModelFiles
from ..support.errors import SourceError


@dataclass(frozen=True)
class Inspection:
    """A checkpoint, all of its tensors verified. linears: path → {"error" (None if not recorded), "bytes"}.

    unknown: why it could not be told whether a plain tensor is missing; None if none is.
    """

    checkpoint: Checkpoint
    linears: dict[str, dict[str, Any]]
    size: int
    unknown: str | None


def inspect(model: str | Path) -> Inspection:
    """Open a packed checkpoint and check every tensor in it; raises `CheckpointError` naming the first fault."""
    files = ModelFiles.find(str(model))
    checkpoint = Checkpoint.open(files)
    recorded = checkpoint.report.get("linears", {})
    in_order = {path: rank for rank, path in enumerate(recorded)}
    linears = {}
    for path in sorted(checkpoint.stored.linears(), key=lambda path: in_order.get(path, len(in_order))):
        packed = checkpoint.packed(path)
        error = recorded.get(path, {}).get("error")
        linears[path] = {"error": error, "bytes": packed.layout.stored_bits() // 8}
    checkpoint.check_plain()
    unknown = None
    try:
        files.require_loadable()
    except SourceError as error:  # what the configuration is wrong about, or needs custom code for, says its reader
        unknown = str(error)
    return Inspection(checkpoint, linears, files.size_bytes(), unknown)
