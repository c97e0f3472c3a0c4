"""Options of the commands that measure models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from .app import option

TEXTS, ANSWERS, RUN = "Texts", "Chains of thought and answers", "Run"

Texts = Annotated[
    list[str] | None, option(TEXTS, "Repeat for more. Default: GSM8K test problems.", "--text", metavar="TEXT")
]
MaxTokens = Annotated[int | None, option(TEXTS, "Use at most so many tokens of each.")]
SeqLen = Annotated[int, option(TEXTS, "Tokens per window.", rare=True)]
Bos = Annotated[
    str,
    option(
        TEXTS,
        "Begin windows with <bos>: auto as the tokenizer has it, always, or never, as published perplexities do.",
        rare=True,
    ),
]
ChainCount = Annotated[int, option(ANSWERS, "Chains of the original's to follow.", "--chains", min=0, metavar="N")]
ChainTokens = Annotated[int, option(ANSWERS, "Most tokens of a chain, up to 4096.", rare=True)]
Gsm8k = Annotated[int, option(ANSWERS, "GSM8K test problems to answer.", min=0, metavar="N")]
TaskNames = Annotated[str | None, option(ANSWERS, "Tasks of lm-eval, with commas between.", "--tasks")]
AnsweringEngine = Annotated[str, option(ANSWERS, "What answers: transformers or vllm.", "--engine")]
AnswerTokens = Annotated[int, option(ANSWERS, "Most tokens of an answer.", rare=True)]
Batch = Annotated[int, option(RUN, "Chains, answers or questions at once.", rare=True)]
Seed = Annotated[int, option(RUN, "Seed of sampling and of bootstrapped intervals.", rare=True)]
Device = Annotated[str, option(RUN, "auto, cpu, cuda, cuda:1, …")]
Trust = Annotated[bool, option(RUN, "Run the models' own Python code.", "--trust-remote-code")]
JsonFile = Annotated[Path | None, option(RUN, "Write the results to this file.", "--json")]


def names_in(tasks: str | None) -> tuple[str, ...]:
    """Return the tasks that an option names."""
    return tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
