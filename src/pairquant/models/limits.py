"""What a model can take: how many positions, and which token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..support.errors import ConfigError, SourceError

#: Parts of the names that tables of learned positions go by: wpe, embed_positions, position_embeddings.
POSITION_NAMES = ("wpe", "position", "pos_emb")


def learned_positions(model: Any) -> int | None:
    """Return how many positions a model with a table of learned ones has; None for a model without."""
    context, tokens = _context(model), model.get_input_embeddings()
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        named = any(part in name for part in POSITION_NAMES) and "relative" not in name
        if named and isinstance(module, nn.Embedding) and module is not tokens:
            rows = module.num_embeddings - getattr(module, "offset", 0)  # the first two of OPT's stand for padding
            return rows if context is None else min(rows, context)
    return None


def _context(model: Any) -> int | None:
    """Return the longest sequence, in tokens, that the model's configuration names."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_length(model: Any, seq_len: int) -> str | None:
    """Raise `ConfigError` for windows longer than the learned positions.

    Returns a notice for windows longer than a model without such a table was made for, which it can read all the same.
    """
    if (positions := learned_positions(model)) is not None and seq_len > positions:
        raise ConfigError(
            f"seq_len is {seq_len}, allowed: up to {positions}, the positions that this model has learned. Lower --seq-len."
        )
    context = _context(model)
    if positions is None and context is not None and seq_len > context:
        return f"windows of {seq_len} tokens are longer than the {context} that this model was made for"
    return None


def check_tokens(model: Any, name: str, *tokens: Tensor | Sequence[int]) -> None:
    """Raise `SourceError` for a token id that the model, called `name`, has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(
        (int(max(ids) if not isinstance(ids, Tensor) else ids.max()) for ids in tokens if len(ids)), default=0
    )
    if highest >= rows:
        raise SourceError(
            f"the tokenizer makes token {highest}, and the embedding of {name!r} has {rows} rows (0 to {rows - 1}): it is "
            "another model's tokenizer. Copy the tokenizer files of the model that this one was made from."
        )
