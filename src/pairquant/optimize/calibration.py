"""Calibration text → seeded windows of tokens, drawn evenly from the sources (see `text` for what a source may be)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..support.errors import TextError
from ..support.text import documents, expand, token_windows


@dataclass(frozen=True)
class Calibration:
    """tokens: int64 [samples, seq_len]; sources: what they came from; digest: SHA-256 of the tokens."""

    tokens: Tensor
    sources: tuple[str, ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()

    def first(self, samples: int) -> Calibration:
        """The first windows only."""
        return Calibration(self.tokens[:samples].contiguous(), self.sources)


def calibrate(tokenizer, sources: Iterable[str], samples: int, seq_len: int, seed: int) -> Calibration:
    """Draw `samples` windows, as evenly over the sources as their lengths allow, without repetition.

    Raises `TextError` for a missing or unreadable source, or when all of them together are too short.
    """
    names = [name for source in sources for name in expand(source)]
    windows = {name: token_windows(tokenizer, documents(name), seq_len) for name in names}
    shares = _even_shares([len(w) for w in windows.values()], samples)
    if sum(shares) < samples:
        held = ", ".join(f"{name}: {len(w)}" for name, w in windows.items())
        raise TextError(
            f"calibration text is too short: {samples} windows of {seq_len} tokens wanted, {sum(shares)} there ({held}). "
            "Add --calibration files, or lower --samples or --seq-len."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = [
        w[torch.randperm(len(w), generator=generator)[:share]]
        for w, share in zip(windows.values(), shares, strict=True)
    ]
    tokens = torch.cat(chosen)[torch.randperm(samples, generator=generator)].contiguous()
    return Calibration(tokens, tuple(names))


def _even_shares(available: list[int], wanted: int) -> list[int]:
    """How many windows to take from each source: equal, and what the short ones lack from the others."""
    shares = [0] * len(available)
    while (missing := wanted - sum(shares)) > 0:
        roomy = [i for i, windows in enumerate(available) if shares[i] < windows]
        if not roomy:
            break
        for rank, i in enumerate(roomy):
            part = missing // len(roomy) + (rank < missing % len(roomy))
            shares[i] += min(part, available[i] - shares[i])
    return shares
