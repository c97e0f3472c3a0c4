"""How numbers and names are written, the same on the terminal and in reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3f}"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: "1 layer", "2 layers"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def departure(median: float | None) -> str:
    """Return the median token at which greedy decoding departs, for a table; a dash if half of the chains or more never do."""
    return "–" if median is None else f"{median:,.0f}"


def departs(median: float | None) -> str:
    """Return the same in words."""
    return "never in half of them or more" if median is None else f"at token {median:,.0f} (median)"


def distinct_ends(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of different paths that tell them apart."""
    parts = [path.parts for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def token_count(shape: Any) -> str:
    """Return "128 × 2048 tokens" for a recorded number of windows and their length; an empty text for anything else."""
    return f"{shape[0]} × {shape[1]} tokens" if isinstance(shape, (list, tuple)) and len(shape) == 2 else ""


def source_names(texts: Any) -> str:
    """Return recorded text sources in words; of files only their names, as the directories are those of another machine."""
    names = texts if isinstance(texts, (list, tuple)) else [texts]
    return ", ".join(Path(name).name if Path(name).is_absolute() else name for name in map(str, names))


def short_name(path: str) -> str:
    """Return the last part of a path without "_proj": "model.layers.3.mlp.up_proj" → "up"."""
    return path.rpartition(".")[2].removesuffix("_proj")


def block_and_rest(path: str) -> tuple[str, str]:
    """Return the number of a block and the rest: "model.layers.3.mlp.up_proj" → "3", "mlp.up_proj"; outside the blocks "" and the path."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return ("", path) if number is None else (parts[number], ".".join(parts[number + 1 :]))
