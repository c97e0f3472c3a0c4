"""The protocol that engines follow, the options that they take, and what they share."""

from __future__ import annotations

import traceback
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jinja2 import TemplateError, TemplateSyntaxError

from ..checkpoint.read import ModelFiles
from ..evaluation.speed import Generates
from ..support.errors import ConfigError, SourceError, did_you_mean

DTYPES = ("auto", "float32", "bfloat16", "float16")
#: vLLM tells missing tensors of quantized models only when asked to.
VLLM_LOADER = {"enable_weights_track": True}
#: One turn of a conversation: {"role": "user", "content": "…"}.
Turn = dict[str, str]


@dataclass(frozen=True)
class EngineOptions:
    """Say how to load a model.

    dtype: of the activations; "auto" is bfloat16 on a CPU (int4 products need it there, and it measured faster than
    float32: 26 against 17 tokens/s for a 135M model on two cores with AVX512-BF16), the stored one on a GPU.
    compile: whether to use torch.compile; None leaves it to the engine.
    sequences, sequence_tokens: the number and the final length of the sequences that vLLM's cache has to hold at once;
    a length of None stands for a conversation.
    any_length: whether the cache must also hold sequences as long as a conversation, where sequence_tokens is less.
    """

    device: str = "auto"
    dtype: str = "auto"
    compile: bool | None = None
    sequences: int = 1
    sequence_tokens: int | None = None
    any_length: bool = False

    def __post_init__(self) -> None:
        """Check the dtype; raises `ConfigError`."""
        check_dtype(self.dtype)

    def dtype_on(self, device: torch.device) -> str:
        """Return a dtype's name, or "auto" for the stored one."""
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
        """Return the device of that name; raises `ConfigError` where the engine cannot use it."""
        ...

    def stream(self, conversation: Sequence[Turn], max_new_tokens: int) -> Generator[str, None, None]:
        """Yield the greedy answer in pieces as they are generated; closing the iterator ends the generation.

        Raises what `chat_tokens` raises, and `ConfigError` where logits are not finite.
        """
        ...


def check_dtype(name: str) -> None:
    """Refuse a dtype that no engine has; raises `ConfigError`."""
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}, allowed: {', '.join(DTYPES)}{did_you_mean(name, DTYPES)}")


def chat_tokens(tokenizer: Any, conversation: Sequence[Turn]) -> list[int]:
    """Return the token ids of a conversation up to where the answer begins.

    Without a chat template the turns are joined as plain text. Raises `SourceError` when the template is broken, and
    `ConfigError` when it refuses the conversation.
    """
    if not tokenizer.chat_template:
        return tokenizer("\n".join(turn["content"] for turn in conversation))["input_ids"]
    try:
        tokens = tokenizer.apply_chat_template(list(conversation), add_generation_prompt=True, return_dict=True)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        if type(error) is TemplateError:  # what the template's own raise_exception() raises
            raise ConfigError(
                f"the model's chat template refuses the conversation: {error}. Ask in the form that it allows."
            ) from error
        raise SourceError(
            f"the model's chat template is broken{_template_line(error)}: {error}. Mend it in chat_template.jinja (or the "
            "entry chat_template of tokenizer_config.json) in the model's directory, or copy it from the original model."
        ) from error
    return tokens["input_ids"]


def _template_line(error: Exception) -> str:
    """Return where in a chat template an error arose, as far as that is known."""
    if isinstance(error, TemplateSyntaxError):
        return f" in line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return f" in line {lines[-1]}" if lines else ""


def overflow(dtype: str) -> ConfigError:
    """Return the error for logits that are NaN or infinite; dtype: name of the activations' type."""
    remedies = {
        "float16": "Values above 65504 overflow in float16. Use --dtype bfloat16 or --dtype float32.",
        "bfloat16": "Use --dtype float32.",
    }
    damaged = "The model may be damaged: run `pairquant inspect` on it, or quantize it again."
    return ConfigError(f"the model's logits are not finite in {dtype}. {remedies.get(dtype, damaged)}")


def context_of(config: Any) -> int | None:
    """Return the longest sequence, in tokens, that a Transformers configuration allows; None where it says nothing."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
