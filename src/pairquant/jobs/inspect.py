"""What a packed checkpoint holds, with every tensor checked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..backends.experts import explain_experts
from ..backends.table import Explanation, explain
from ..checkpoint.original import looked_up
from ..checkpoint.read import Checkpoint, ModelFiles
from ..spec.experts import block_layouts
from ..spec.linear import LinearLayout
from ..support.devices import resolve_device
from ..support.errors import ConfigError, SourceError, did_you_mean
from ..support.formatting import short_name

#: What layers may compute in, by name.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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


@dataclass(frozen=True)
class Running:
    """Who runs layers of one kind and layout here: `names`, such as "down", and how many layers there are."""

    names: str
    count: int
    layout: LinearLayout
    explanation: Explanation


def simulated(model: str | Path, device: str = "auto", dtype: str = "bfloat16") -> str | None:
    """Return the format of activations that a model has and this machine only simulates; None for none, and for plain models.

    device, dtype: as for `backends`; a dtype of another name is taken as bfloat16.
    """
    if not ModelFiles.find(str(model)).is_packed:
        return None
    rows = backends(model, device, dtype if dtype in DTYPES else "bfloat16")
    return next((row.explanation.simulated for row in rows if row.explanation.simulated), None)


def backends(model: str | Path, device: str = "auto", dtype: str = "bfloat16") -> list[Running]:
    """Return what would run each layer of a packed checkpoint on this machine, and why better backends would not.

    Layers of one name and layout that run in the same way share a row. dtype: of the activations. Raises `ConfigError` for an unknown dtype or device,
    `CheckpointError` for a damaged checkpoint.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, allowed: {', '.join(DTYPES)}{did_you_mean(dtype, DTYPES)}")
    target = resolve_device(device)
    files = ModelFiles.find(str(model))
    checkpoint = Checkpoint.open(files)
    stored, by_row = checkpoint.stored, looked_up(files)
    layouts = {path: checkpoint.layout(path) for path in stored.linears()}
    blocks = block_layouts(layouts, stored.pools())
    kinds = Counter((short_name(path), layout, blocks.get(path), path in by_row) for path, layout in layouts.items())
    rows: dict[tuple[str, LinearLayout, str], Running] = {}
    for (name, layout, block, is_looked_up), count in kinds.items():
        if is_looked_up:
            explanation = Explanation("row lookup", {})
        elif block is not None:
            explanation = explain_experts(block, target, DTYPES[dtype], stored.has_own_transforms)
        else:
            explanation = explain(layout, target, DTYPES[dtype])
        kind = name, layout, str(explanation)
        count += rows[kind].count if kind in rows else 0
        rows[kind] = Running(name, count, layout, explanation)
    return list(rows.values())
