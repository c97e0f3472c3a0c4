"""Implements `pairquant chat`."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from .app import Model, app, console, option, quiet_libraries
from .engine_options import Device, Dtype, EngineName, Trust

ANSWERS = "Answers"


@app.command(epilog='Example: pairquant chat MODEL-PARO --prompt "Why is the sky blue?"')
def chat(
    model: Model,
    prompt: Annotated[str | None, option(ANSWERS, "Answer this and exit. Default: ask for questions.")] = None,
    max_new_tokens: Annotated[int, option(ANSWERS, "Longest answer, in tokens.", min=1)] = 512,
    engine: EngineName = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Chat with MODEL; each answer appears while it is generated."""
    quiet_libraries()
    from ..checkpoint.read import ModelFiles
    from ..engines import choice
    from ..engines.engine import EngineOptions, Turn
    from ..support.devices import resolve_device

    options = EngineOptions(device, dtype)
    resolve_device(device)
    files = ModelFiles.find(model, trust_remote_code)
    chosen = choice.choose(engine, files, prefer_vllm=choice.gpu_wanted(device))
    choice.check_template(choice.check_model(files))
    talker = choice.start(chosen, files, options)
    history: list[Turn] = []
    if prompt is None:
        console.print("[dim]An empty line or Ctrl-D ends the chat.[/]")
    while question := prompt if prompt is not None else _ask():
        history.append({"role": "user", "content": question})
        answer = ""
        with closing(talker.stream(history, max_new_tokens)) as pieces:
            for piece in pieces:
                typer.echo(piece, nl=False)
                answer += piece
        typer.echo()
        history.append({"role": "assistant", "content": answer})
        if prompt is not None:
            break


def _ask() -> str:
    """Read a question; an empty one ends the chat."""
    try:
        return console.input("[bold]> [/]").strip()
    except EOFError:
        return ""
