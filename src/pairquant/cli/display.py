"""Show progress and numbers, and check where results go, in the same way in every command."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Self

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..support.formatting import duration, number, percent, plain, scientific, short_name, size
from .app import console

__all__ = [
    "command_line", "duration", "followed", "in_lines", "number", "percent", "plain", "progress_bars", "require_place", "scientific", "short_name", "size",
]  # fmt: skip


class TimeLeft(ProgressColumn):
    """The time left, counting down also while a step that takes minutes goes on."""

    max_refresh = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[float, float, float, float]] = {}

    def render(self, task: Task) -> Text:
        """Show the time since the first step that was seen, over its steps, times those that are left."""
        seconds = self.seconds_left(task.id, task.completed, task.total, task.elapsed or 0.0)
        return Text(
            "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds))), style="progress.remaining"
        )

    def seconds_left(self, key: int, completed: float, total: float | None, elapsed: float) -> float | None:
        """Estimate the seconds left; None before the first step is done. elapsed: seconds since the task began."""
        base, begun, last, at = self.seen.get(key, (completed, elapsed, completed, elapsed))
        if completed < last:  # begun anew
            base, begun, last, at = completed, elapsed, completed, elapsed
        if completed != last:
            last, at = completed, elapsed
        self.seen[key] = base, begun, last, at
        if total is None or last <= base:
            return None
        of_a_step = (at - begun) / (last - base)
        return max(0.0, of_a_step * (total - completed) - (elapsed - at))


def progress_bars(visible: bool = True) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeLeft(),
        console=console if visible else Console(quiet=True),
        transient=True,
    )


def followed(bars: Progress) -> Callable[[str, int], Callable[[], None]]:
    """Return what to tell that a part of so many steps begins: a bar for it, and what to call after each step."""

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
    """Return a command as it can be typed: paths with spaces in quotes."""
    return shlex.join(map(str, words))


def in_lines(name: str, width: int) -> str:
    """Return a path or name in lines of at most this many letters, broken after / - _ . or a space; longer parts stay whole."""
    lines = [""]
    for part in re.findall(r"[^/\-_. ]*[/\-_. ]|[^/\-_. ]+", name):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


class JobBars:
    """Shows what a job does, how far it is, and what it notices."""

    def __init__(self, visible: bool = True) -> None:
        self.bars = progress_bars(visible)

    def __enter__(self) -> Self:
        self.bars.start()
        self.task = self.bars.add_task("reading model", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.update(self.task, visible=False)
        self.bars.stop()

    def stage(self, text: str) -> None:
        self.bars.update(self.task, description=text)

    def notice(self, text: str) -> None:
        self.bars.console.print(f"[yellow]{escape(text)}[/]")

    def advance(self, what: str, done: int, total: int) -> None:
        self.bars.update(self.task, description=what, total=total, completed=done)
