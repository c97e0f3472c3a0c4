"""What of a model's directory travels with its weights: tokenizer, templates, processors, licence, card, custom code."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

#: Weights of any format, here or of other libraries. Only safetensors are ever read.
WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.gguf", "*.onnx", "*.onnx_data",
    "*.msgpack", "*.h5", "*.ot", "*.tflite", "*.npz",
)  # fmt: skip
#: Why a file or directory does not travel → names of such; a directory takes all below it along.
LEFT_BEHIND = {
    "weights, which are written anew": WEIGHTS,
    "which file holds which weight": ("*.index.json",),
    "hidden": (".*",),
    "caches and what killed programs left": ("__pycache__", "*.pyc", "*.partial"),
    "states of a training": ("checkpoint-*",),
}
#: At the top of the directory only: written for each model anew.
WRITTEN = frozenset({"config.json", "pairquant.json", "pairquant.jsonl"})


def side_files(directory: Path) -> Iterator[Path]:
    """Yield paths, relative to the directory, of all files that travel; in order.

    A directory below that is a model itself (config.json and weights) stays where it is, and so do linked directories.
    """
    for place, below, names in os.walk(directory):
        here = Path(place)
        below[:] = sorted(name for name in below if _travels(name) and not _is_model(here / name))
        for name in sorted(names):
            written = here == directory and name in WRITTEN
            if _travels(name) and not written and (here / name).is_file():
                yield (here / name).relative_to(directory)


def copy_side_files(directory: Path, target: Path, without: frozenset[str] = frozenset()) -> None:
    """Copy what travels, byte for byte; `without` names files that do not."""
    for file in side_files(directory):
        if str(file) not in without:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(directory / file, target / file)


def is_weights(name: str) -> bool:
    """Return whether a file of this name holds weights, of whatever format."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in WEIGHTS)


def _travels(name: str) -> bool:
    return not any(fnmatchcase(name.lower(), pattern) for patterns in LEFT_BEHIND.values() for pattern in patterns)


def _is_model(directory: Path) -> bool:
    return (directory / "config.json").is_file() and any(is_weights(file.name) for file in directory.iterdir())
