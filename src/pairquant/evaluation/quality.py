"""Perplexity, divergence and agreement, on token windows. Takes models, never paths."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Positions whose log-probabilities are compared at a time: bounds memory at this many times the vocabulary.
CHUNK = 256


@dataclass(frozen=True)
class Quality:
    """Of one text. tokens: predictions made; kl: mean KL(reference ‖ model) per token, nats; top1: agreement."""

    tokens: int
    perplexity: float
    kl: float | None = None
    top1: float | None = None


@torch.no_grad()
def measure(model: nn.Module, windows: Tensor, reference: nn.Module | None = None, on_window=None) -> Quality:
    """Next-token quality over windows int64 [W, T]; each window predicts its last T - 1 tokens."""
    device = next(model.parameters()).device
    totals = torch.zeros(3, dtype=torch.float64)
    for window in windows:
        window = window[None].to(device)
        logits = model(input_ids=window, use_cache=False).logits[0, :-1]
        expected = reference(input_ids=window, use_cache=False).logits[0, :-1] if reference is not None else None
        totals += _window_totals(logits, window[0, 1:], expected).cpu()
        if on_window:
            on_window()
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    loss, kl, agreed = (totals / tokens).tolist()
    quality = Quality(tokens, math.exp(min(loss, 700.0)))
    return quality if reference is None else Quality(quality.tokens, quality.perplexity, kl, agreed)


def _window_totals(logits: Tensor, targets: Tensor, expected: Tensor | None) -> Tensor:
    """Sums over positions of the negative log-likelihood, the KL divergence and the top-1 agreements: float64 [3]."""
    totals = torch.zeros(3, dtype=torch.float64, device=logits.device)
    for start in range(0, len(targets), CHUNK):
        rows = slice(start, start + CHUNK)
        log_p = F.log_softmax(logits[rows].float(), dim=-1)
        totals[0] += F.nll_loss(log_p, targets[rows], reduction="sum")
        if expected is not None:
            log_q = F.log_softmax(expected[rows].float(), dim=-1)
            totals[1] += F.kl_div(log_p, log_q, log_target=True, reduction="sum")
            totals[2] += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
    return totals
