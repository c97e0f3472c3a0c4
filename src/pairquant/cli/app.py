"""The application that every command joins, the consoles, and the options that several commands share."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="4-bit language models by scaled pairwise rotation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)
problems = Console(stderr=True, highlight=False)


Model = Annotated[str, typer.Argument(help="A model directory, a hub name, or a .gguf file.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]


def quiet_libraries() -> None:
    """Transformers' own bars and notices would tear ours apart; its errors still come through."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
