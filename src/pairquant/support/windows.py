"""Cut documents into windows of tokens, for calibration and evaluation.

The tokens of all documents are joined into one sequence, which is cut into windows. If the tokenizer puts `<bos>` before a
text, every window begins with it, because the model was trained that way: without it, Gemma 3 270M has a perplexity of 122
instead of 25.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .conversations import Conversation
from .errors import ConfigError, TextError

#: The most characters tokenized at a time: what a tokenizer returns takes a hundred times the memory of the text.
BATCH = 2**22
#: Characters tokenized at first for each token that is needed: more than the four or five of a typical English token.
CHARACTERS = 8
#: Halves of characters, which UTF-8 cannot encode.
SURROGATES = re.compile("[\ud800-\udfff]")
#: A function that is called with a message for the user.
Notice = Callable[[str], None]


def silent(text: str) -> None:
    """Ignore the message: the `Notice` for callers that show none."""


def own_prefix(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids of the tokens that the tokenizer puts before every text: usually `<bos>`, or none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for place in range(len(whole) - len(bare) + 1):
        if whole[place : place + len(bare)] == bare:
            return tuple(whole[:place])
    return ()


def window_prefix(tokenizer: Any, bos: str = "auto") -> tuple[int, ...]:
    """Return the ids of the tokens that every window begins with.

    bos: "auto": what the tokenizer puts before a text; "never": nothing; "always": the same as "auto", or `<bos>` if the
    tokenizer puts nothing. Raises `ConfigError` for "always" if the tokenizer has no `<bos>`.
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
    """Write for the user which tokens every window begins with."""
    return f"every window begins with {''.join(tokenizer.convert_ids_to_tokens(list(prefix)))} (--bos never: without)"


def token_windows(
    tokenizer: Any,
    documents: Iterable[str | Conversation],
    seq_len: int,
    prefix: Sequence[int] = (),
    most: int | None = None,
    notice: Notice = silent,
) -> Tensor:
    """Join the documents' tokens and cut them into windows: int64 [windows, seq_len]; a shorter rest is left out.

    prefix: ids of the tokens that every window begins with; they count towards `seq_len`. most: return only the first
    `most` windows, and read no more documents than these need; None: all. notice: is told if characters were replaced.
    Raises `TextError` for chats that the tokenizer cannot write, and if the prefix leaves no room for text.
    """
    own = seq_len - len(prefix)
    if own < 1:
        raise TextError(
            f"a window of {seq_len} tokens has no room for text after its first {len(prefix)}. Raise --seq-len."
        )
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
    """Yield the text of each document: plain text with an empty line after it, a chat as its template writes it."""
    told = False
    for document in documents:
        chat = isinstance(document, Conversation)
        text = document.written(tokenizer) if isinstance(document, Conversation) else document.strip() + "\n\n"
        text, replaced = SURROGATES.subn("\ufffd", text)
        if replaced and not told:
            notice("the text has halves of characters (lone surrogates); each was replaced by \ufffd")
            told = True
        if text.strip():
            yield text, chat


def _batches(texts: Iterator[_Text], limit: int) -> Iterator[list[_Text]]:
    """Yield lists of texts; the texts of a list have at least `limit` characters together, except in the last list."""
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
    """Return the tokens of all texts, int64 [tokens].

    If a chat template wrote the tokenizer's prefix, it is removed: the prefix belongs at the beginning of windows, not of
    documents.
    """
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
