"""Show progress and numbers, and check where results go, in the same way in every command."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..support.formatting import duration, number, percent, plain, scientific, short_name, size
from .app import console

__all__ = [
    "command_line", "duration", "followed", "number", "percent", "plain", "progress_bars", "require_place", "scientific", "short_name", "size",
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
    if json_file is None:
        return
    directory = json_file.absolute().parent
    if not directory.is_dir():
        raise typer.BadParameter(f"no such directory: {directory}", param_hint="--json")
    if json_file.is_dir():
        raise typer.BadParameter(f"{json_file} is a directory; name a file in it", param_hint="--json")
    if not os.access(json_file if json_file.exists() else directory, os.W_OK):
        raise typer.BadParameter(f"{json_file} cannot be written; choose another place", param_hint="--json")


def command_line(*words: str | Path) -> str:
    """A command as it can be typed: paths with spaces in quotes."""
    return shlex.join(map(str, words))
