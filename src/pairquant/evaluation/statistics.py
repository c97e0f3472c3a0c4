"""Intervals, and tests on paired outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt
from statistics import NormalDist

import torch

CONFIDENCE = 0.95
RESAMPLES = 4000

Interval = tuple[float, float]


def bootstrap_mean(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> Interval | None:
    """Return the percentile interval of the weighted mean, values drawn again with their weights; None for fewer than two."""
    if len(values) < 2:
        return None
    v = torch.tensor(values, dtype=torch.float64)
    w = torch.ones_like(v) if weights is None else torch.tensor(weights, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(v), (len(v),), generator=generator) for _ in range(RESAMPLES))
    means = torch.stack([(v[draw] * w[draw]).sum() / w[draw].sum() for draw in draws])
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def wilson(successes: int, trials: int) -> Interval:
    """Return Return Wilson's score interval of a proportion."""
    z, share = NormalDist().inv_cdf((1 + CONFIDENCE) / 2), successes / trials
    center = share + z * z / (2 * trials)
    reach = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (center - reach) / scale), min(1.0, (center + reach) / scale)


def mcnemar(lost: int, gained: int) -> float:
    """Return the exact two-sided p-value of McNemar's test, from the pairs in which one was right and the other wrong."""
    return min(1.0, 2 * _binomial_cdf(min(lost, gained), lost + gained))


def probability_no_worse(lost: int, gained: int) -> float:
    """Return the probability that a question whose outcome differs is more likely gained than lost, from a uniform prior (Beta(1, 1))."""
    return _binomial_cdf(gained, lost + gained + 1)


def _binomial_cdf(successes: int, trials: int) -> float:
    """Return P(X ≤ successes) for the heads X of a fair coin, exactly."""
    return sum(comb(trials, k) for k in range(successes + 1)) / 2**trials
