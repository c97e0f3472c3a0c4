"""Which channels rotate together: K independent sets of disjoint pairs per group (paper, Algorithm A1).

A *rank* puts all g(g-1)/2 pairs of a group in an order. Each rotation goes through the pairs in that order and takes
every pair whose two channels are still free in this rotation, unless an earlier rotation took it. The result is the
lexicographically first matching. Going through the pairs one by one would be slow. The same result is found for all groups
in parallel, in about log2(g) rounds: each round takes every pair that is the earliest free pair of both its channels.
Channels that remain without a partner are paired in ascending order, and the angles of these pairs stay at zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairSelection:
    """The pairs of every rotation and group.

    pairs: int16 [K, C], channels counted from 0 within their group; entries 2t and 2t+1 of a group are the pair (i, j),
    i < j. free: bool [K, C/2], False for pairs of channels that remained without a partner; their angle must stay zero.
    """

    pairs: Tensor
    free: Tensor


def random_rank(
    num_groups: int, group_size: int, generator: torch.Generator, device: torch.device | None = None
) -> Tensor:
    """Draw an independent random order of all pairs for each group: float32 [G, g, g], symmetric, infinite diagonal.

    The random numbers are drawn on the CPU, so that the order does not depend on the device.
    """
    num_pairs = group_size * (group_size - 1) // 2
    order = torch.rand(num_groups, num_pairs, generator=generator).to(device).argsort(dim=-1, stable=True)
    return _symmetric(order.argsort(-1), group_size)


def magnitude_rank(magnitude: Tensor, group_size: int) -> Tensor:
    """Order the pairs of each group by the difference of their channels' magnitudes, the largest difference first.

    magnitude: [C], any measure of a channel's size, such as the mean absolute weight. Returns float32 [G, g, g], symmetric,
    with an infinite diagonal.
    """
    by_group = magnitude.detach().double().view(-1, group_size)
    i, j = torch.triu_indices(group_size, group_size, offset=1, device=magnitude.device)
    difference = (by_group[:, i] - by_group[:, j]).abs()
    order = difference.argsort(dim=-1, descending=True, stable=True)
    return _symmetric(order.argsort(-1), group_size)


def select_pairs(rank: Tensor, rotations: int) -> PairSelection:
    """Choose the pairs of K independent rotations for each group, greedily in the order of `rank` [G, g, g].

    The result is on the device of `rank`.
    """
    num_groups, g, _ = rank.shape
    rank = rank.clone()
    pairs = torch.empty(rotations, num_groups, g // 2, 2, dtype=torch.int16, device=rank.device)
    free = torch.empty(rotations, num_groups, g // 2, dtype=torch.bool, device=rank.device)
    for k in range(rotations):
        partner = _first_matching(rank)
        pairs[k], free[k] = _as_pairs(partner)
        _forget(rank, partner)
    return PairSelection(pairs.view(rotations, num_groups * g), free.view(rotations, num_groups * g // 2))


def _symmetric(position: Tensor, g: int) -> Tensor:
    """Turn the positions of the pairs i < j, [G, g(g-1)/2] in upper-triangle order, into symmetric matrices [G, g, g]."""
    rank = torch.full((position.shape[0], g, g), torch.inf, device=position.device)
    i, j = torch.triu_indices(g, g, offset=1, device=position.device)
    rank[:, i, j] = rank[:, j, i] = position.float()
    return rank


def _first_matching(rank: Tensor) -> Tensor:
    """Return the lexicographically first matching of each group: the partner of each channel [G, g], -1 for none."""
    num_groups, g, _ = rank.shape
    remaining = rank.clone()
    partner = torch.full((num_groups, g), -1, device=rank.device)
    channel = torch.arange(g, device=rank.device)
    while True:
        earliest, candidate = remaining.min(-1)
        mutual = candidate.gather(1, candidate) == channel
        chosen = mutual & earliest.isfinite()
        if not chosen.any():
            return partner
        partner = torch.where(chosen, candidate, partner)
        remaining.masked_fill_(chosen[:, :, None] | chosen[:, None, :], torch.inf)


def _as_pairs(partner: Tensor) -> tuple[Tensor, Tensor]:
    """Turn partners [G, g] into pairs [G, g/2, 2], and a mask of the pairs that were chosen.

    Channels without a partner are paired with one another, after the chosen pairs.
    """
    num_groups, g = partner.shape
    channel = torch.arange(g, device=partner.device).expand(num_groups, g)
    lonely = partner < 0
    # Sort channels by the lower channel of their pair, so that both channels of a pair are neighbours; those without a
    # partner come last.
    lower = torch.where(lonely, g + channel, torch.minimum(channel, partner))
    order = (lower * g + channel).argsort(-1)
    return order.view(num_groups, g // 2, 2), ~lonely.gather(1, order)[:, ::2]


def _forget(rank: Tensor, partner: Tensor) -> None:
    """Remove the matched pairs from the order, in place, so that no later rotation takes them."""
    group, channel = (partner >= 0).nonzero(as_tuple=True)
    rank[group, channel, partner[group, channel]] = torch.inf
