"""Measuring the kernels' tiles for the shapes of a checkpoint on this GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.original import looked_up
from ..checkpoint.read import Checkpoint, ModelFiles
from ..layers.model import SIBLINGS
from ..support.devices import resolve_device
from ..support.errors import ResourceError


def tune(model: str | Path, device: str = "auto") -> Iterator[tuple[tuple[int, ...], int, dict[int, Any]]]:
    """Measure the kernels' tiles for every shape of a packed checkpoint on this GPU, and keep the best in the user's table.

    Yields (out_features of the linears of one launch, in_features, {tokens: choice}) as each shape is done and saved.
    Raises `ResourceError` without an NVIDIA GPU and Triton.
    """
    from ..kernels.availability import device_class, triton_missing
    from ..kernels.run import table

    target = resolve_device(device)
    if target.type != "cuda":
        raise ResourceError("measuring kernels needs an NVIDIA GPU, and none was found")
    if reason := triton_missing():
        raise ResourceError(f"measuring kernels needs Triton: {reason}")
    from ..kernels.run.tune import tune_shape

    files = ModelFiles.find(str(model))
    checkpoint = Checkpoint.open(files)
    embeddings = looked_up(files)
    layouts = {path: checkpoint.layout(path) for path in checkpoint.stored.linears() if path not in embeddings}
    for group_size, bits in sorted({(layout.group_size, layout.bits) for layout in layouts.values()}):
        linears = {
            path: (s.out_features, s.in_features)
            for path, s in layouts.items()
            if (s.group_size, s.bits) == (group_size, bits)
        }
        for sizes, channels in launched_shapes(linears):
            choices = tune_shape(sizes, channels, group_size, target, bits=bits)
            table.save_user_table(device_class(target), {(sum(sizes), channels): choices})
            yield sizes, channels, choices


def launched_shapes(linears: Mapping[str, tuple[int, int]]) -> list[tuple[tuple[int, ...], int]]:
    """Path → (out_features, in_features) of each linear to the distinct shapes that are launched, siblings merged."""
    siblings = {name: names for names in SIBLINGS for name in names}
    shapes: dict[tuple[tuple[int, ...], int], None] = {}
    for path, (rows, channels) in linears.items():
        parent, _, name = path.rpartition(".")
        group = [f"{parent}.{other}" for other in siblings.get(name, (name,))]
        if all(other in linears and linears[other][1] == channels for other in group):
            shapes[tuple(linears[other][0] for other in group), channels] = None
        else:
            shapes[(rows,), channels] = None
    return list(shapes)
