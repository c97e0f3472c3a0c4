"""Options of the commands that run a model on an engine."""

from __future__ import annotations

from typing import Annotated

import typer

EngineName = Annotated[str, typer.Option("--engine", help="auto, transformers or vllm.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32, for activations.")]
