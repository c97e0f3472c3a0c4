"""Options of the commands that run a model on an engine, as one group of their help."""

from __future__ import annotations

from typing import Annotated

from .app import option

#: Heading of the group.
ENGINE = "Engine"

EngineName = Annotated[str, option(ENGINE, "auto, transformers or vllm.", "--engine")]
Dtype = Annotated[str, option(ENGINE, "auto, bfloat16, float16 or float32.")]
Device = Annotated[str, option(ENGINE, "auto, cpu, cuda, cuda:1, …")]
Trust = Annotated[bool, option(ENGINE, "Run the model's own Python code.", "--trust-remote-code")]
