"""Write numbers and names as text, in the same way on the terminal and in reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def size(count: float) -> str:
    """Write a number of bytes in GB (10⁹ bytes) or MB (10⁶ bytes)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Write seconds as "2 min 5 s", or as "5.3 s" below a minute."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def number(value: float | None, digits: int) -> str:
    """Write a number with so many digits after the point; None gives an empty string."""
    return "" if value is None else f"{value:.{digits}f}"


def scientific(value: float | None) -> str:
    """Write a number as "1.2e-03"; None gives an empty string."""
    return "" if value is None else f"{value:.1e}"


def percent(value: float | None) -> str:
    """Write a fraction as a percentage with three digits after the point and no sign; None gives a dash."""
    return "–" if value is None else f"{100 * value:.3f}"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: "1 layer", "2 layers"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def plain(value: Any) -> str:
    """Write any value as text; the items of a list or tuple are separated by commas."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def departure(median: float | None) -> str:
    """Write, for a table, the median token at which the quantized model's greedy decoding first differs from the original's.

    Gives a dash if at least half of the texts never differ (median is None).
    """
    return "–" if median is None else f"{median:,.0f}"


def departs(median: float | None) -> str:
    """Write in words what `departure` writes for a table."""
    return "never in half of them or more" if median is None else f"at token {median:,.0f} (median)"


def distinct_ends(paths: Sequence[Path]) -> list[str]:
    """Return the last parts of each path: as many parts, the same number for all, as make all the results different."""
    parts = [path.parts for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def token_count(shape: Any) -> str:
    """Write a recorded pair (number of windows, their length) as "128 × 2048 tokens"; anything else gives ""."""
    return f"{shape[0]} × {shape[1]} tokens" if isinstance(shape, (list, tuple)) and len(shape) == 2 else ""


def source_names(texts: Any) -> str:
    """Write the names of recorded text sources, separated by commas.

    Absolute paths are cut to the file's name, because the folders of the machine that wrote the record mean nothing here.
    """
    names = texts if isinstance(texts, (list, tuple)) else [texts]
    return ", ".join(Path(name).name if Path(name).is_absolute() else name for name in map(str, names))


def short_name(path: str) -> str:
    """Return the last part of a path without "_proj": "model.layers.3.mlp.up_proj" → "up"."""
    return path.rpartition(".")[2].removesuffix("_proj")


def block_and_rest(path: str) -> tuple[str, str]:
    """Split a path at its block: "model.layers.3.mlp.up_proj" → ("3", "mlp.up_proj"); outside the blocks → ("", path)."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return ("", path) if number is None else (parts[number], ".".join(parts[number + 1 :]))
