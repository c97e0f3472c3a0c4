"""Continuations of prompts through Transformers' `generate`, in batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..support.devices import current
from ..support.errors import ConfigError

GREEDY: Mapping[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
#: The model's own distribution, whatever it recommends for answering.
SAMPLED: Mapping[str, Any] = {
    "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Continuation:
    """tokens: ids, the end-of-text token included; finished: whether the model ended it, rather than the limit on new tokens."""

    tokens: list[int]
    finished: bool


def check_context(prompts: Sequence[Sequence[int]], new_tokens: int, context: int | None, option: str) -> None:
    """Raise `ConfigError` when the longest prompt and new_tokens are more than a model's longest sequence."""
    longest = max(map(len, prompts))
    if context is not None and longest + new_tokens > context:
        raise ConfigError(
            f"{option} is {new_tokens}, allowed: {max(context - longest, 0)}, the model's context of {context} tokens "
            f"less the longest prompt's {longest}."
        )


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    options: Mapping[str, Any] = GREEDY,
    *,
    batch: int = 8,
    seed: int = 0,
    on_prompt: Callable[[], None] | None = None,
) -> list[Continuation]:
    """Continue each prompt of token ids by at most new_tokens tokens; `on_prompt` is called after each."""
    ends = _end_tokens(model)
    found = []
    with current(model.device), torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch):
            tokens, mask = _padded(prompts[start : start + batch], model.device)
            padding = {"pad_token_id": ends[0]} if ends else {}
            output = model.generate(tokens, attention_mask=mask, max_new_tokens=new_tokens, **padding, **options)
            for row in output[:, tokens.shape[1] :].tolist():
                found.append(_until_end(row, ends))
                if on_prompt:
                    on_prompt()
    return found


def _end_tokens(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens and attention mask, int64 [B, longest], padded on the left."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return tokens, mask


def _until_end(row: list[int], ends: Sequence[int]) -> Continuation:
    """Return the row up to its first end-of-text token; in a batch, rows go on until the last has ended."""
    for place, token in enumerate(row, 1):
        if token in ends:
            return Continuation(row[:place], finished=True)
    return Continuation(row, finished=False)
