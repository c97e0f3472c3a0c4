"""Which model is closest to the original, and by how much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan

from .statistics import Interval, bootstrap_mean


@dataclass(frozen=True)
class Gap:
    """How much further from the original a model is than the closest one.

    kl: mean difference in nats per token; interval: its 95 % bootstrap interval, None for a single window or chain.
    """

    kl: float
    interval: Interval | None


@dataclass(frozen=True)
class Ranking:
    """model: the closest one's name; ahead_of: the gap of every other one, by name."""

    model: str
    ahead_of: dict[str, Gap]


def rank(kl: Mapping[str, Sequence[float]], weights: Sequence[float] | None = None, seed: int = 0) -> Ranking:
    """Rank models by their KL from the original: name → nats per token of the same windows or chains, in one order.

    weights: how much each window or chain counts, such as its tokens; equally by default. Differences are taken window by
    window, so that what makes a window hard for all models does not widen the intervals. seed: the bootstrap's.
    """
    shares = weights or [1.0] * len(next(iter(kl.values())))

    def mean(values: Iterable[float]) -> float:
        return sum(share * value for share, value in zip(shares, values, strict=True)) / sum(shares)

    closest = min(kl, key=lambda name: (isnan(mean(kl[name])), mean(kl[name])))
    ahead = {}
    for name, values in kl.items():
        if name != closest:
            differences = [other - own for other, own in zip(values, kl[closest], strict=True)]
            ahead[name] = Gap(mean(differences), bootstrap_mean(differences, weights, seed))
    return Ranking(closest, ahead)
