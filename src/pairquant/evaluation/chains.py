"""What single tokens do not show: divergence along whole chains of thought, and when decoding takes another way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..support.errors import ConfigError
from .generation import GREEDY, SAMPLED, Continuation, generate
from .quality import Part, by_position, score
from .statistics import Interval, bootstrap_mean

MAX_TOKENS = 4096


@dataclass(frozen=True)
class ChainPlan:
    """count: of chains, one for each prompt; tokens: of each at the most; batch: chains sampled at once."""

    count: int
    tokens: int = 1024
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `ConfigError`."""
        if self.count < 1:
            raise ConfigError(f"the number of chains is {self.count}, allowed: 1 or more")
        if not 1 <= self.tokens <= MAX_TOKENS:
            raise ConfigError(f"tokens of a chain are {self.tokens}, allowed: 1 to {MAX_TOKENS}")
        if self.batch < 1:
            raise ConfigError(f"batch is {self.batch}, allowed: 1 or more")


@dataclass(frozen=True)
class Chains:
    """A reference's continuations of prompts (token ids): sampled at temperature 1, and greedy."""

    plan: ChainPlan
    prompts: Sequence[Sequence[int]]
    sampled: Sequence[Continuation]
    greedy: Sequence[Continuation]


@dataclass(frozen=True)
class ChainQuality:
    """Along `Chains`: as they are sampled at temperature 1, `kl` times a chain's tokens estimates the divergence of whole
    answers.

    kl: mean KL(reference ‖ model) per token, nats; kl_interval: 95 %, by bootstrap over chains, None for a single one;
    kl_by_position: see `by_position`; kl_of_chains, tokens_of_chains: each one's mean and length; finished: share of
    chains that ended by themselves; departures: of each greedy chain the first token that the model would have chosen
    otherwise, counted from 0, None if it never does; departure_median: None if half or more never do; never_departed:
    their share.
    """

    chains: int
    tokens: int
    kl: float
    kl_interval: Interval | None
    kl_by_position: list[Part]
    kl_of_chains: list[float]
    tokens_of_chains: list[int]
    finished: float
    departures: list[int | None]
    departure_median: float | None
    never_departed: float


def sample(
    reference: Any, prompts: Sequence[Sequence[int]], plan: ChainPlan, on_chain: Callable[[], None] | None = None
) -> Chains:
    """Sample a chain for each prompt, and decode one greedily; `on_chain` is called after each."""
    sampled, greedy = (
        generate(reference, prompts, plan.tokens, way, batch=plan.batch, seed=plan.seed, on_prompt=on_chain)
        for way in (SAMPLED, GREEDY)
    )
    return Chains(plan, prompts, sampled, greedy)


def measure(model: Any, reference: Any, chains: Chains, on_chain: Callable[[], None] | None = None) -> ChainQuality:
    """Measure the model against the reference that made the chains. `on_chain` is called after each of the two chains of a prompt."""
    step = on_chain or (lambda: None)
    kl, departures = [], []
    for prompt, chain, own in zip(chains.prompts, chains.sampled, chains.greedy, strict=True):
        kl.append(_along(model, reference, prompt, chain)[0])
        step()
        departures.append(_departure(_along(model, reference, prompt, own)[1]))
        step()
    means, lengths = [row.mean().item() for row in kl], [len(row) for row in kl]
    return ChainQuality(
        chains=len(kl),
        tokens=sum(lengths),
        kl=torch.cat(kl).double().mean().item(),
        kl_interval=bootstrap_mean(means, lengths, chains.plan.seed),
        kl_by_position=by_position(kl),
        kl_of_chains=means,
        tokens_of_chains=lengths,
        finished=sum(chain.finished for chain in chains.sampled) / len(kl),
        departures=departures,
        departure_median=_median(departures),
        never_departed=departures.count(None) / len(departures),
    )


def _along(model: Any, reference: Any, prompt: Sequence[int], chain: Continuation) -> tuple[Tensor, Tensor]:
    """KL and agreement at each of a chain's n tokens: float32 [n] each."""
    window = torch.tensor([*prompt, *chain.tokens], device=model.device)
    scores = score(model, window, reference, start=len(prompt))
    assert scores.kl is not None, "measured, as there is a reference"
    assert scores.top1 is not None, "measured, as there is a reference"
    return scores.kl, scores.top1


def _departure(agrees: Tensor) -> int | None:
    """Return where the model first chooses otherwise. Up to there both decode the same tokens, so the reference's are enough.

    The reference's choice is the one from the same forward pass, not the chain's token: near-ties that fall differently
    in a batch are not the model's doing.
    """
    places = (agrees == 0).nonzero()
    return int(places[0]) if len(places) else None


def _median(departures: list[int | None]) -> float | None:
    """Return chains that never depart count as longer than all others."""
    middle = median(float("inf") if place is None else place for place in departures)
    return None if middle == float("inf") else middle
