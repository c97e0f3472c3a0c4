"""Documents → windows of tokens, for calibration and for evaluation alike.

Documents are packed end to end and cut. Where the tokenizer puts `<bos>` before a text, every window begins with it, as
a model that was trained so expects: without, Gemma 3 270M has a perplexity of 122 in place of 25.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .conversations import Conversation
from .errors import ConfigError, TextError

#: Most characters tokenized at a time: what a tokenizer makes of a text takes a hundred times its size.
BATCH = 2**22
#: Characters tokenized at a time for a token wanted: a token of English has four or five.
CHARACTERS = 8
SURROGATES = re.compile("[\ud800-\udfff]")
#: Told what else a user should know.
Notice = Callable[[str], None]


def silent(text: str) -> None:
    """Ignore the text: the `Notice` of those who want none."""


def own_prefix(tokenizer: Any) -> tuple[int, ...]:
    """Return the token ids that the tokenizer puts before every text: `<bos>`, for most that put any."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for place in range(len(whole) - len(bare) + 1):
        if whole[place : place + len(bare)] == bare:
            return tuple(whole[:place])
    return ()


def window_prefix(tokenizer: Any, bos: str = "auto") -> tuple[int, ...]:
    """Return the token ids that windows begin with.

    bos: "auto", what the tokenizer puts before a text; "never", nothing; "always", `<bos>` if the tokenizer puts nothing.
    Raises `ConfigError` where "always" finds no `<bos>`.
    """
    if bos == "never":
        return ()
    prefix, token = own_prefix(tokenizer), tokenizer.bos_token_id
    if not prefix and token is not None and (bos == "always" or getattr(tokenizer, "add_bos_token", False)):
        prefix = (token,)
    if bos == "always" and not prefix:
        raise ConfigError("bos is 'always', but the tokenizer has no <bos> token. Allowed: auto, never.")
    return prefix


def describe(tokenizer: Any, prefix: Sequence[int]) -> str:
    """Return text for a notice that says how windows begin."""
    return f"every window begins with {''.join(tokenizer.convert_ids_to_tokens(list(prefix)))} (--bos never: without)"


def token_windows(
    tokenizer: Any,
    documents: Iterable[str | Conversation],
    seq_len: int,
    prefix: Sequence[int] = (),
    most: int | None = None,
    notice: Notice = silent,
) -> Tensor:
    """Return all whole windows of the packed documents, or the first `most` of them: int64 [windows, seq_len].

    prefix: token ids that each begins with, `seq_len` tokens with it; no more is read than `most` windows need. Raises
    `TextError` for chats that the tokenizer cannot write.
    """
    own = seq_len - len(prefix)
    if own < 1:
        raise TextError(f"a window of {seq_len} tokens has no room for text after {len(prefix)}. Raise --seq-len.")
    parts, held = [torch.empty(0, dtype=torch.int64)], 0
    limit = BATCH if most is None else min(BATCH, most * own * CHARACTERS)
    for batch in _batches(_texts(tokenizer, documents, notice), limit):
        parts.append(_tokens(tokenizer, batch))
        held += len(parts[-1])
        if most is not None and held >= most * own:
            break
    flat = torch.cat(parts)
    windows = flat[: len(flat) // own * own].view(-1, own)[:most]
    if not prefix:
        return windows
    return torch.cat([torch.tensor(prefix).expand(len(windows), -1), windows], dim=1)


#: A text, and whether the chat template may have written the tokenizer's prefix at its beginning.
_Text = tuple[str, bool]


def _texts(tokenizer: Any, documents: Iterable[str | Conversation], notice: Notice) -> Iterator[_Text]:
    """Yield documents as they are packed: plain ones with an empty line behind, chats as their template writes them."""
    told = False
    for document in documents:
        chat = isinstance(document, Conversation)
        text = document.written(tokenizer) if isinstance(document, Conversation) else document.strip() + "\n\n"
        text, replaced = SURROGATES.subn("\ufffd", text)
        if replaced and not told:
            notice("halves of characters (lone surrogates) were replaced by \ufffd")
            told = True
        if text.strip():
            yield text, chat


def _batches(texts: Iterator[_Text], limit: int) -> Iterator[list[_Text]]:
    """Yield texts of about `limit` characters together."""
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text[0])
        if characters >= limit:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokens(tokenizer: Any, batch: list[_Text]) -> Tensor:
    """Return token ids, int64 [tokens]. The prefix that a chat template writes is left out: windows begin with it, texts do not."""
    encoded = tokenizer(
        [text for text, _ in batch], add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    prefix = list(own_prefix(tokenizer)) if any(chat for _, chat in batch) else []
    if prefix:
        encoded = [
            ids[len(prefix) :] if chat and ids[: len(prefix)] == prefix else ids
            for ids, (_, chat) in zip(encoded, batch, strict=True)
        ]
    return torch.tensor([token for ids in encoded for token in ids], dtype=torch.int64)
