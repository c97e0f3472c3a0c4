"""Implements `pairquant serve`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape

from .app import Model, app, option, problems, quiet_libraries
from .engine_options import ENGINE, Dtype, EngineName, Trust

ADDRESS = "Address"


@app.command(epilog="Example: pairquant serve MODEL-PARO --port 8000 --max-model-len 32768 -- --max-num-seqs 64")
def serve(
    model: Model,
    extra: Annotated[list[str] | None, typer.Argument(help="Arguments for the engine's own server, after --.")] = None,
    host: Annotated[str, option(ADDRESS, "Where to listen; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, option(ADDRESS, "Port to listen on.", min=1, max=65535)] = 8000,
    engine: EngineName = "auto",
    dtype: Dtype = "auto",
    max_model_len: Annotated[
        int | None,
        option(ENGINE, "Longest sequence in tokens, prompt and answer. Default: what the model and memory allow."),
    ] = None,
    tensor_parallel: Annotated[int, option(ENGINE, "GPUs that share each layer; vLLM only.")] = 1,
    trust_remote_code: Trust = False,
) -> None:
    """Serve MODEL to OpenAI's clients, with vLLM where it is installed, else with Transformers."""
    quiet_libraries()
    from ..checkpoint.read import ModelFiles
    from ..engines import choice, server

    options = server.ServerOptions(host, port, dtype, max_model_len, tensor_parallel, extra or ())
    files = ModelFiles.find(model, trust_remote_code)
    chosen = choice.choose(engine, files, prefer_vllm=True)
    tokenizer = choice.check_model(files)
    choice.check_template(tokenizer)
    command = server.command(chosen, files, options)
    server.check_address(host, port)
    problems.print(
        f"[bold]{chosen}[/] serves model {escape(repr(model))} at http://{host}:{port}/v1 once it has started; "
        "Ctrl-C ends it",
        soft_wrap=True,
    )
    if not tokenizer.chat_template:
        problems.print(
            "the tokenizer has no chat template: /v1/completions works, /v1/chat/completions does not", soft_wrap=True
        )
    sys.stdout.flush()
    sys.stderr.flush()
    command.replace_process()
