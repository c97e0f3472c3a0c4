"""`pairquant serve`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape

from .app import Model, Trust, app, problems, quiet_libraries
from .engine_options import Dtype, EngineName


@app.command()
def serve(
    model: Model,
    extra: Annotated[
        list[str] | None, typer.Argument(help="After --: further arguments of the engine's server.")
    ] = None,
    engine: EngineName = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    dtype: Dtype = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence, in tokens. Default: what fits.")] = None,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs that share each layer.")] = 1,
    trust_remote_code: Trust = False,
) -> None:
    """An OpenAI-compatible server for MODEL: vLLM's when it is installed, else Transformers'."""
    quiet_libraries()
    from ..checkpoint.read import ModelFiles
    from ..engines import choice, server

    options = server.ServerOptions(host, port, dtype, max_model_len, tensor_parallel, extra or ())
    files = ModelFiles.find(model, trust_remote_code)
    chosen = choice.choose(engine, files, prefer_vllm=True)
    tokenizer = choice.check_model(files)
    command = server.command(chosen, files, options)
    server.check_address(host, port)
    problems.print(
        f"[bold]{chosen}[/] serves model {escape(repr(model))} at http://{host}:{port}/v1 once it has started; "
        "Ctrl-C ends it",
        soft_wrap=True,
    )
    if not tokenizer.chat_template:
        problems.print("the tokenizer has no chat template: /v1/completions works, /v1/chat/completions does not")
    sys.stdout.flush()
    sys.stderr.flush()
    command.replace_process()
