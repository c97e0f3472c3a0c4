"""What an engine is, and what one can be asked for."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..checkpoint.read import ModelFiles
from ..evaluation.speed import Generates
from ..support.errors import ConfigError, did_you_mean

DTYPES = ("auto", "float32", "bfloat16", "float16")
#: vLLM tells missing tensors of quantized models only when asked to.
VLLM_LOADER = {"enable_weights_track": True}
#: One turn of a conversation: {"role": "user", "content": "…"}.
Turn = dict[str, str]


@dataclass(frozen=True)
class EngineOptions:
    """How to load a model.

    dtype: of the activations; "auto" is bfloat16 on a CPU (there int4 products need it, and it measured faster than
    float32: 26 against 17 tokens/s for a 135M model on two cores with AVX512-BF16), the stored one on a GPU. compile:
    torch.compile, None for what the engine does by itself. sequences, sequence_tokens: how many at once, and how long at
    their end, vLLM's cache is to hold; None for a conversation. any_length: whether it must hold whatever the model can
    take, up to a conversation's length, also where the sequences are shorter.
    """

    device: str = "auto"
    dtype: str = "auto"
    compile: bool | None = None
    sequences: int = 1
    sequence_tokens: int | None = None
    any_length: bool = False

    def __post_init__(self) -> None:
        """Raises `ConfigError`."""
        check_dtype(self.dtype)

    def dtype_on(self, device: torch.device) -> str:
        """A dtype's name, or "auto" for the stored one."""
        return "bfloat16" if self.dtype == "auto" and device.type == "cpu" else self.dtype


class Engine(Generates, Protocol):
    """A loaded model that answers and generates."""

    name: str
    version: str
    device: torch.device
    dtype: str
    compiled: bool

    def __init__(self, files: ModelFiles, options: EngineOptions): ...

    @staticmethod
    def place(device: str) -> torch.device:
        """Where a model goes for a device by name; raises `ConfigError`."""
        ...

    def stream(self, conversation: Sequence[Turn], max_new_tokens: int) -> Generator[str, None, None]:
        """The greedy answer, piece by piece as it is generated; closing the iterator ends the generation."""
        ...


def check_dtype(name: str) -> None:
    """Raises `ConfigError`."""
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}, allowed: {', '.join(DTYPES)}{did_you_mean(name, DTYPES)}")


def chat_tokens(tokenizer: Any, conversation: Sequence[Turn]) -> list[int]:
    """Token ids of a conversation up to where the answer begins; without a chat template, its plain text."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(list(conversation), add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    return tokenizer("\n".join(turn["content"] for turn in conversation))["input_ids"]


def context_of(config: Any) -> int | None:
    """The longest sequence, in tokens, that a Transformers configuration allows."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
