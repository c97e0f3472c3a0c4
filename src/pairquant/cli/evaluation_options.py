"""Options of the commands that measure models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Texts = Annotated[
    list[str] | None,
    typer.Option("--text", help="Text to evaluate on; repeat for more. Default: GSM8K test problems."),
]
SeqLen = Annotated[int, typer.Option(help="Tokens per window.")]
MaxTokens = Annotated[int | None, typer.Option(help="Use at most this many tokens of each text.")]
Bos = Annotated[
    str,
    typer.Option(
        help="Begin windows with <bos>: auto as the tokenizer has it, always, or never, as published perplexities do."
    ),
]
ChainCount = Annotated[
    int, typer.Option("--chains", help="Chains of thought sampled from the original to follow.", min=0)
]
ChainTokens = Annotated[int, typer.Option(help="Most tokens of a chain, up to 4096.")]
Gsm8k = Annotated[int, typer.Option(help="GSM8K test problems to answer, of 1319.", min=0)]
TaskNames = Annotated[str | None, typer.Option("--tasks", help="Tasks of lm-eval, with commas between.")]
AnsweringEngine = Annotated[
    str, typer.Option("--engine", help="What answers and runs tasks: transformers (auto) or vllm.")
]
AnswerTokens = Annotated[int, typer.Option(help="Most tokens of an answer.")]
Batch = Annotated[int, typer.Option(help="Chains, answers or questions at once.")]
Seed = Annotated[int, typer.Option(help="Of sampling and of bootstrapped intervals.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]


def names_in(tasks: str | None) -> tuple[str, ...]:
    """The tasks that an option names."""
    return tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
