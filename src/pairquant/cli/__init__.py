"""The command line. Each verb is one call into the package, and printing; each has its file here."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.markup import escape

from ..support.errors import PairQuantError
from ..support.version import __version__

from . import quantize, plan, fold, evaluate, compare, chat, serve, bench, inspect, report, export, push, tune  # isort: skip  # noqa: F401  # in the order of the help
from .app import app, console, problems


def with_home(arguments: list[str]) -> list[str]:
    """Replace "~" in arguments such as --output=~/model, which shells leave as they are."""
    expanded = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_path = equals and name.startswith("--") and value.startswith("~")
        expanded.append(f"{name}={os.path.expanduser(value)}" if is_path else argument)
    return expanded


def main() -> None:
    """Run the command line; print errors that the user can mend without a traceback."""
    try:
        app(with_home(sys.argv[1:]))
    except PairQuantError as error:
        problems.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        problems.print("\nstopped; the same command continues a quantization that has finished blocks")
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(f"pairquant {__version__}")
        raise typer.Exit
