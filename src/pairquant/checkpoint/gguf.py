"""What a GGUF file says of its tokenizer, and the tokenizer that is made from it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..support.windows import own_prefix


def with_bos(tokenizer: Any, file: Path) -> Any:
    """Return the tokenizer, putting `<bos>` before a text where the file says that it does (`tokenizer.ggml.add_bos_token`).

    Transformers 5.19 leaves that out of Gemma's.
    """
    if not own_prefix(tokenizer) and adds_bos(file) and tokenizer.bos_token_id is not None:
        tokenizer.add_bos_token = True
    return tokenizer


def adds_bos(file: Path) -> bool:
    """Return whether the file says that `<bos>` goes before a text."""
    from gguf import GGUFReader  # needed for these files only; Transformers could not read them without it

    field = GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
    return field is not None and bool(field.contents())
