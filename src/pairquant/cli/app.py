"""The application that every command joins, the consoles, and the options that several commands share."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from rich.console import Console


def _show_every_option(context: typer.Context, wanted: bool) -> None:
    if wanted:
        for each in context.command.params:
            each.hidden = False  # type: ignore[attr-defined]
        print(context.get_help())
        raise typer.Exit


#: For commands with more options than fit a screen: those made with `rare` are hidden from --help.
HelpAll = Annotated[
    bool, typer.Option("--help-all", help="Show every option and exit.", is_eager=True, callback=_show_every_option)
]


def option(panel: str, text: str, *names: str, rare: bool = False, **more: Any) -> Any:
    """Make an option in a group of the help; rare: shown by --help-all only."""
    return typer.Option(*names, help=text, rich_help_panel=panel, hidden=rare, **more)


app = typer.Typer(
    help="Quantize language models to 2 to 8 bits by scaled pairwise rotation, run them, measure them.",
    epilog="Example: pairquant quantize Qwen/Qwen3-0.6B --output Qwen3-0.6B-PARO",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)
problems = Console(stderr=True, highlight=False)


Model = Annotated[str, typer.Argument(help="A directory, a hub name or a .gguf file.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own Python code.")]


def quiet_libraries() -> None:
    """Silence Transformers' progress bars and notices, which would be printed into ours; its errors are still shown."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
