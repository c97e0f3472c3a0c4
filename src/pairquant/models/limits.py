"""Check the limits of a model: how many positions it has, and which token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..support.errors import ConfigError, SourceError

#: A table of learned positions has one of these in its name: wpe, embed_positions, position_embeddings.
POSITION_NAMES = ("wpe", "position", "pos_emb")


def learned_positions(model: Any) -> int | None:
    """Return the number of learned positions of a model; None for a model that has no table of positions.

    The table lies beside the input embedding: those of vision and audio towers limit something else.
    """
    context, tokens = stated_context(model), model.get_input_embeddings()
    beside = next((dict(module.named_children()) for module in model.modules() if tokens in module.children()), {})
    for name, module in beside.items():
        named = any(part in name for part in POSITION_NAMES) and "relative" not in name
        if named and isinstance(module, nn.Embedding) and module is not tokens:
            # The first two rows of OPT's table are for padding.
            rows = module.num_embeddings - getattr(module, "offset", 0)
            return rows if context is None else min(rows, context)
    return None


def stated_context(model: Any) -> int | None:
    """Return the longest sequence, in tokens, that the model's configuration states; None if it states none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_length(model: Any, seq_len: int) -> str | None:
    """Check that a model can read windows of `seq_len` tokens.

    Raises `ConfigError` if there are fewer learned positions. A model without learned positions can read longer windows
    than it was made for; for these, a notice is returned, otherwise None.
    """
    if (positions := learned_positions(model)) is not None and seq_len > positions:
        raise ConfigError(
            f"seq_len is {seq_len}, allowed: up to {positions}, the number of positions that this model has learned. "
            "Lower --seq-len."
        )
    context = stated_context(model)
    if positions is None and context is not None and seq_len > context:
        return f"windows of {seq_len} tokens are longer than the {context} that this model was made for"
    return None


def check_tokens(model: Any, name: str, *tokens: Tensor | Sequence[int]) -> None:
    """Check that the model, called `name`, has an embedding for every token id; raises `SourceError` if not."""
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(
        (int(max(ids) if not isinstance(ids, Tensor) else ids.max()) for ids in tokens if len(ids)), default=0
    )
    if highest >= rows:
        raise SourceError(
            f"the tokenizer gives token id {highest}, but {name!r} only has embeddings for ids 0 to {rows - 1}: the tokenizer "
            "belongs to another model. Copy the tokenizer files of the model that this one was made from."
        )
