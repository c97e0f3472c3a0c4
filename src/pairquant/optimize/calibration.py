"""Calibration text → seeded windows of tokens, drawn evenly from the sources (see `text` for what a source may be).

Of a text above `rows.LARGE` only pieces are read, spread evenly over it: 60 MB took 114 s and 10 GB of memory otherwise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..models.limits import check_length, check_tokens
from ..spec.options import QuantConfig
from ..support.conversations import Conversation
from ..support.errors import TextError
from ..support.formatting import size
from ..support.rows import Pieces
from ..support.text import SELF, documents, expand, size_in_pieces
from ..support.windows import Notice, describe, silent, token_windows, window_prefix

#: Bytes of a large text that are read for a token wanted: four times a token of English.
BYTES_PER_TOKEN = 16
#: The smallest piece of a large text in bytes, and the fewest pieces.
PIECE, PIECES = 2**16, 16


@dataclass(frozen=True)
class Calibration:
    """tokens: int64 [samples, seq_len]; sources: what they came from; digest: SHA-256 of the tokens.

    bos: whether every window begins with `<bos>`.
    """

    tokens: Tensor
    sources: tuple[str, ...]
    bos: bool = False

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()

    def first(self, samples: int) -> Calibration:
        """Return the first windows only."""
        return replace(self, tokens=self.tokens[:samples].contiguous())


#: Gives so many windows of text that the model samples, int64 [count, seq_len]; and what makes one for a prefix of windows.
Sampler = Callable[[int], Tensor]
Sampling = Callable[[Sequence[int]], Sampler]


class Draw(Protocol):
    """`calibrate` with the options of a run filled in; raises as it does."""

    def __call__(self, sources: Iterable[str], samples: int, more: int = 0) -> Calibration: ...


def calibrate(
    tokenizer: Any,
    sources: Iterable[str],
    samples: int,
    seq_len: int,
    seed: int,
    *,
    more: int = 0,
    prefix: Sequence[int] = (),
    notice: Notice = silent,
    sampled: Sampler | None = None,
) -> Calibration:
    """Draw `samples` windows, as evenly over the sources as their lengths allow, without repetition.

    more: so many others follow them, as far as there is text; the first are the same without, unless a text is so large that
    pieces of it are read, which are then others. prefix: what each begins with (see `windows.window_prefix`); notice: told of
    large texts that are read in pieces; sampled: gives the windows of the source "self", which are as many as its share.
    Raises `TextError` for a missing or unreadable source, or when all of them together are too short.
    """
    names = list(dict.fromkeys(name for source in sources for name in expand(source)))
    draw = _Draw(tokenizer, samples + more, seq_len, seed, prefix, notice)
    own = sampled if SELF in names else None
    windows = {name: draw.windows(name) for name in names if own is None or name != SELF}
    there = [len(windows[name]) if name in windows else samples + more for name in names]
    shares = _even_shares(there, samples)
    if sum(shares) < samples:
        held = ", ".join(f"{name}: {len(w)}" for name, w in windows.items())
        raise TextError(
            f"calibration text is too short: {samples} windows of {seq_len} tokens wanted, {sum(shares)} there ({held}). "
            "Add --calibration files, or lower --samples or --seq-len."
        )
    further = _even_shares([count - share for count, share in zip(there, shares, strict=True)], more)
    taken = [(share, share + rest) for share, rest in zip(shares, further, strict=True)]
    if own is not None:
        windows[SELF] = own(taken[names.index(SELF)][1])
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(windows[name]), generator=generator) for name in names]
    parts = zip(names, orders, taken, strict=True)
    first, rest = zip(*((windows[n][order[:i]], windows[n][order[i:j]]) for n, order, (i, j) in parts), strict=True)
    mixed = [torch.cat(part)[torch.randperm(sum(map(len, part)), generator=generator)] for part in (first, rest)]
    return Calibration(torch.cat(mixed).contiguous(), tuple(names), bool(prefix))


def calibrator(
    model: Any, name: str, tokenizer: Any, config: QuantConfig, notice: Notice, sampling: Sampling | None = None
) -> Draw:
    """Return `calibrate` with a run's options filled in: it takes sources, and numbers of windows.

    model: may be without weights; name: what errors call it; sampling: what makes `sampled`. Raises `ConfigError` for windows
    that are longer than it can read, and later `SourceError` for tokens that it does not know.
    """
    if unusual := check_length(model, config.seq_len):
        notice(unusual)
    prefix = window_prefix(tokenizer, config.bos)
    if prefix:
        notice(describe(tokenizer, prefix))

    def draw(sources: Iterable[str], samples: int, more: int = 0) -> Calibration:
        drawn = calibrate(
            tokenizer, sources, samples, config.seq_len, config.seed, more=more, prefix=prefix, notice=notice,
            sampled=sampling(prefix) if sampling is not None else None,
        )  # fmt: skip
        check_tokens(model, name, drawn.tokens)
        return drawn

    return draw


@dataclass(frozen=True)
class _Draw:
    """What is wanted of every source: the arguments of `calibrate`."""

    tokenizer: Any
    samples: int
    seq_len: int
    seed: int
    prefix: Sequence[int]
    notice: Notice

    @property
    def pieces(self) -> Pieces:
        """What to read of a large text: several times the windows wanted, each piece longer than a window."""
        length = max(PIECE, BYTES_PER_TOKEN * self.seq_len)
        count = math.ceil(self.samples * self.seq_len * BYTES_PER_TOKEN / length)
        return Pieces(max(PIECES, count), length, self.seed)

    def windows(self, name: str) -> Tensor:
        """Return windows of a source, int64 [W, seq_len]: all, or of a large text at least as many as are wanted."""
        pieces = self.pieces
        if length := size_in_pieces(name, pieces):
            windows = self._cut(name, documents(name, pieces))
            if len(windows) >= self.samples:
                read = f"{pieces.count} pieces of {size(pieces.size)}, spread evenly over its {size(length)}"
                self.notice(f"{name}: a large text, of which {read}, are read")
                return windows
        return self._cut(name, documents(name))

    def _cut(self, name: str, found: Iterable[str | Conversation]) -> Tensor:
        def tell(text: str) -> None:
            self.notice(f"{name}: {text}")

        return token_windows(self.tokenizer, found, self.seq_len, self.prefix, notice=tell)


def _even_shares(available: list[int], wanted: int) -> list[int]:
    """Return how many windows to take from each source: equal, and what the short ones lack from the others."""
    shares = [0] * len(available)
    while (missing := wanted - sum(shares)) > 0:
        roomy = [i for i, windows in enumerate(available) if shares[i] < windows]
        if not roomy:
            break
        for rank, i in enumerate(roomy):
            part = missing // len(roomy) + (rank < missing % len(roomy))
            shares[i] += min(part, available[i] - shares[i])
    return shares
