"""How numbers, tables and progress look, the same in every command."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .app import console


def progress_bars(visible: bool = True) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console if visible else Console(quiet=True),
        transient=True,
    )


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


def plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def short_name(path: str) -> str:
    """ "model.layers.3.mlp.up_proj" → "up"."""
    return path.rpartition(".")[2].removesuffix("_proj")
