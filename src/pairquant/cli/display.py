"""How progress looks, and numbers (see `wording`), the same in every command."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..wording import duration, number, percent, plain, scientific, short_name, size
from .app import console

__all__ = ["duration", "number", "percent", "plain", "progress_bars", "scientific", "short_name", "size"]


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
