"""Options of the commands that run a model on an engine, as one group of their help."""

from __future__ import annotations

from typing import Annotated

import typer

#: Heading of the group.
ENGINE = "Engine"

EngineName = Annotated[
    str, typer.Option("--engine", help="What runs the model: auto, transformers or vllm.", rich_help_panel=ENGINE)
]
Dtype = Annotated[
    str,
    typer.Option(help="Type of the activations: auto, bfloat16, float16 or float32.", rich_help_panel=ENGINE),
]
Device = Annotated[str, typer.Option(help="Where the model runs: auto, cpu, cuda, cuda:1, …", rich_help_panel=ENGINE)]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the model.", rich_help_panel=ENGINE),
]
