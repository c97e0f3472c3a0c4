"""Perplexity, divergence and agreement, on token windows. Takes models, never paths."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import TypedDict

from .logits import chunks, logits_over
from .statistics import Interval, bootstrap_mean

#: Parts of a window over which divergence is shown by position.
BINS = 8
#: Logits that a CPU compares at a time, as numbers: 4 MiB in float32, which stay in caches.
PIECE_NUMBERS = 2**20


class Part(TypedDict):
    """The mean divergence of predictions start to end - 1, counted from 0. kl: nats per token."""

    start: int
    end: int
    kl: float


@dataclass(frozen=True)
class Quality:
    """Of one text. tokens: predictions made; kl: mean KL(reference ‖ model) per token, nats; top1: agreement.

    kl_interval: 95 %, by bootstrap over windows, None for a single one; kl_by_position: see `by_position`; kl_of_windows:
    each one's mean.
    """

    tokens: int
    perplexity: float
    kl: float | None = None
    top1: float | None = None
    kl_interval: Interval | None = None
    kl_by_position: list[Part] | None = None
    kl_of_windows: list[float] | None = None


@dataclass(frozen=True)
class Scores:
    """Of predictions, one by one: float32 [P] on the CPU. loss: nats; kl, top1: against the reference, if there is one."""

    loss: Tensor
    kl: Tensor | None = None
    top1: Tensor | None = None


def measure(
    model: nn.Module,
    windows: Tensor,
    reference: nn.Module | None = None,
    on_window: Callable[[], None] | None = None,
    seed: int = 0,
    start: int = 1,
) -> Quality:
    """Measure how well the tokens of windows, int64 [W, T], are predicted from `start` on.

    start: 1, or the length of what all windows begin with, which is not predicted; seed: the bootstrap's.
    """
    device = next(model.parameters()).device
    found = []
    for window in windows:
        found.append(score(model, window.to(device), reference, start))
        if on_window:
            on_window()
    loss = torch.stack([scores.loss for scores in found]).double()
    perplexity = math.exp(min(loss.mean().item(), 700.0))
    if reference is None:
        return Quality(loss.numel(), perplexity)
    kl = torch.stack([scores.kl for scores in found if scores.kl is not None]).double()
    top1 = torch.stack([scores.top1 for scores in found if scores.top1 is not None]).double()
    of_windows = kl.mean(1).tolist()
    return Quality(
        loss.numel(),
        perplexity,
        kl.mean().item(),
        top1.mean().item(),
        bootstrap_mean(of_windows, seed=seed),
        by_position(list(kl)),
        of_windows,
    )


@torch.no_grad()
def score(model: nn.Module, window: Tensor, reference: nn.Module | None = None, start: int = 1) -> Scores:
    """Return the model's predictions of the tokens from `start` on of a window int64 [T], each from all tokens before it."""
    logits = logits_over(model, window)
    expected = logits_over(reference, window) if reference is not None else None
    vocabulary = logits(slice(0, 1)).shape[-1]
    found = torch.empty(1 if expected is None else 3, len(window) - start, device=window.device)
    for rows in chunks(range(start - 1, len(window) - 1), vocabulary):
        own, other = logits(rows), expected(rows) if expected else None
        for piece in _pieces(own):
            targets = window[rows.start + 1 : rows.stop + 1][piece]
            scores = _scores(own[piece], targets, None if other is None else other[piece])
            place = rows.start - start + 1 + piece.start
            found[:, place : place + len(targets)] = torch.stack(scores)
    return Scores(*found.cpu())


def _pieces(logits: Tensor) -> list[slice]:
    """Return a few rows after the other on a CPU, all at once on a GPU."""
    step = len(logits) if logits.is_cuda else max(1, PIECE_NUMBERS // logits.shape[-1])
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def _scores(logits: Tensor, targets: Tensor, expected: Tensor | None) -> tuple[Tensor, ...]:
    """Negative log-likelihood of targets [n], and against expected logits [n, V] KL and agreement: float32 [n] each.

    Σ q (log q − log p), in the memory of the two logarithms: asking for more takes as long as the arithmetic.
    """
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    loss = F.nll_loss(log_p, targets, reduction="none")
    if expected is None:
        return (loss,)
    log_q = F.log_softmax(expected, dim=-1, dtype=torch.float32)
    top1 = log_p.argmax(-1) == log_q.argmax(-1)
    difference = torch.sub(log_q, log_p, out=log_p)
    kl = log_q.exp_().mul_(difference).sum(-1)
    return loss, kl, top1.float()


def by_position(kl: list[Tensor], bins: int = BINS) -> list[Part]:
    """Return the mean of rows [P], which may differ in length, over equal parts of the longest.

    Parts in which no row has a prediction are left out.
    """
    longest = max(map(len, kl))
    edges = [longest * i // bins for i in range(bins + 1)]
    parts: list[Part] = []
    for start, end in pairwise(edges):
        if values := [row[start:end].double() for row in kl if len(row) > start and end > start]:
            parts.append({"start": start, "end": end, "kl": torch.cat(values).mean().item()})
    return parts
