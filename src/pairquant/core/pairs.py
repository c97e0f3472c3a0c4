"""Which channels rotate together: K independent sets of disjoint pairs per group (paper, Algorithm A1).

A *rank* orders all g(g-1)/2 pairs of a group, first come first served. Each rotation walks that order and takes every
pair whose two channels are still free in this rotation and that no earlier rotation took. The walk is sequential by
nature, yet its result, the lexicographically first matching, is also reached by taking at once every pair that is the
earliest at both of its channels, and repeating until no free pair is left: all groups in parallel, about
log2(g) rounds. Channels left alone are paired in ascending order and their angle stays at zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairSelection:
    """Pairs of every rotation and group.

    pairs: int16 [K, C], group-local; entries 2t and 2t+1 of a group are the pair (i, j), i < j.
    free: bool [K, C/2], False where the pair only fills up and its angle must stay zero.
    """

    pairs: Tensor
    free: Tensor


def random_rank(
    num_groups: int, group_size: int, generator: torch.Generator, device: torch.device | None = None
) -> Tensor:
    """Return an independent random order of all pairs for each group: float32 [G, g, g], symmetric, infinite diagonal.

    The numbers are drawn on the CPU, so that the order is the same whatever device it is for.
    """
    num_pairs = group_size * (group_size - 1) // 2
    order = torch.rand(num_groups, num_pairs, generator=generator).to(device).argsort(dim=-1, stable=True)
    return _symmetric(order.argsort(-1), group_size)


def magnitude_rank(magnitude: Tensor, group_size: int) -> Tensor:
    """Return largest difference in channel magnitude first.

    magnitude: [C], any measure of a channel's size, such as the mean absolute weight. Returns float32 [G, g, g].
    """
    by_group = magnitude.detach().double().view(-1, group_size)
    i, j = torch.triu_indices(group_size, group_size, offset=1, device=magnitude.device)
    difference = (by_group[:, i] - by_group[:, j]).abs()
    order = difference.argsort(dim=-1, descending=True, stable=True)
    return _symmetric(order.argsort(-1), group_size)


def select_pairs(rank: Tensor, rotations: int) -> PairSelection:
    """Select the pairs of K independent rotations for each group, greedily in the order given by `rank` [G, g, g], on its device."""
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
    """Return positions of the pairs (i < j) in upper-triangle order [G, g(g-1)/2] → symmetric matrices [G, g, g]."""
    rank = torch.full((position.shape[0], g, g), torch.inf, device=position.device)
    i, j = torch.triu_indices(g, g, offset=1, device=position.device)
    rank[:, i, j] = rank[:, j, i] = position.float()
    return rank


def _first_matching(rank: Tensor) -> Tensor:
    """Return the lexicographically first matching of each group: partner of each channel [G, g], or -1 when left alone."""
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
    """Return partners [G, g] → pairs [G, g/2, 2] with those left alone paired last, and a mask of the genuine ones."""
    num_groups, g = partner.shape
    channel = torch.arange(g, device=partner.device).expand(num_groups, g)
    lonely = partner < 0
    # Sort channels so that a pair's two members are neighbours: by the pair's lower channel, the lonely ones last.
    lower = torch.where(lonely, g + channel, torch.minimum(channel, partner))
    order = (lower * g + channel).argsort(-1)
    return order.view(num_groups, g // 2, 2), ~lonely.gather(1, order)[:, ::2]


def _forget(rank: Tensor, partner: Tensor) -> None:
    """Take the matched pairs out of the order, in place."""
    group, channel = (partner >= 0).nonzero(as_tuple=True)
    rank[group, channel, partner[group, channel]] = torch.inf
