"""A model's logits, made for a few positions at a time: a vocabulary of 262k tokens times a window is gigabytes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: Logits held at a time, as numbers: 128 MiB in float32.
CHUNK_NUMBERS = 2**25

#: Rows of a window → its logits there, [rows, V].
Logits = Callable[[slice], Tensor]


def logits_over(model: nn.Module, window: Tensor) -> Logits:
    """Return the logits over a window int64 [T], made when asked for: the body runs once, the output embedding for each chunk.

    What a model does to its logits after the output embedding is read from its configuration (see `_finish`), and
    checked at the last position against the model's own; a model that does something else gives all its logits at once.
    """
    body = _body(model)
    if body is None:
        whole = model(input_ids=window[None], use_cache=False).logits[0]
        return whole.__getitem__
    states, own = _states(model, body, window)

    def chunk(rows: slice) -> Tensor:
        return _finish(model, model.get_output_embeddings()(states[rows]))  # type: ignore[operator]

    if states.shape[0] == len(window) and _same(chunk(slice(-1, None))[0], own):
        return chunk
    whole = model(input_ids=window[None], use_cache=False).logits[0]
    return whole.__getitem__


def chunks(positions: range, vocabulary: int) -> list[slice]:
    """Return positions cut so that the logits of each piece are `CHUNK_NUMBERS` at the most."""
    step = max(1, CHUNK_NUMBERS // vocabulary)
    return [slice(start, min(start + step, positions.stop)) for start in range(positions.start, positions.stop, step)]


def _body(model: Any) -> nn.Module | None:
    """Return the part before the output embedding; None where the two cannot be told apart."""
    if getattr(model, "get_output_embeddings", None) is None or model.get_output_embeddings() is None:
        return None
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return None
    body = model.get_decoder()
    return None if body is model else body


def _states(model: nn.Module, body: nn.Module, window: Tensor) -> tuple[Tensor, Tensor]:
    """Return the body's output [T, hidden], and the model's own logits [V] at the last position."""
    caught: list[Tensor] = []
    hook = body.register_forward_hook(lambda module, inputs, output: caught.append(output[0][0]))
    try:
        own = model(input_ids=window[None], use_cache=False, logits_to_keep=1).logits[0, -1]
    finally:
        hook.remove()
    return caught[-1], own


def _finish(model: Any, logits: Tensor) -> Tensor:
    """Gemma caps its logits, Cohere multiplies them, Granite divides them."""
    config = model.config.get_text_config()
    if factor := getattr(config, "logit_scale", None):
        logits = logits * factor
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def _same(logits: Tensor, own: Tensor) -> bool:
    """Return whether two logits are the same, up to the rounding by which a product of one position differs from one of many."""
    tolerance = max(1e-4, 4 * torch.finfo(own.dtype).eps)
    return bool((logits - own).abs().max() <= tolerance * own.abs().max())
