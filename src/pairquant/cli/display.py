"""How progress looks, and numbers (see `wording`), and where results go, the same in every command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..support.formatting import duration, number, percent, plain, scientific, short_name, size
from .app import console

__all__ = [
    "duration", "followed", "number", "percent", "plain", "progress_bars", "require_place", "scientific", "short_name", "size",
]  # fmt: skip


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


def followed(bars: Progress) -> Callable[[str, int], Callable[[], None]]:
    """What to tell that a part of so many steps begins: a bar for it, and what to call after each step."""

    def on_part(name: str, count: int) -> Callable[[], None]:
        task = bars.add_task(name, total=count)
        return lambda: bars.advance(task)

    return on_part


def require_place(json_file: Path | None) -> None:
    """Refuse a --json file that could not be written, before the work whose results it is for."""
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise typer.BadParameter(f"no such directory: {json_file.absolute().parent}", param_hint="--json")
