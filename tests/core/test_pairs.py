"""Independent channel pairs (Algorithm A1), against the sequential walk that defines them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pairquant.core.pairs import magnitude_rank, random_rank, select_pairs

GROUP_SIZES = (32, 64, 128)
sizes = st.sampled_from(GROUP_SIZES)
rotations = st.integers(0, 16)
seeds = st.integers(0, 2**31)


def select(g: int, k: int, seed: int, groups: int = 2):
    return select_pairs(random_rank(groups, g, torch.Generator().manual_seed(seed)), k)


def genuine(selection, g: int) -> list[list[set[tuple[int, int]]]]:
    """The free pairs as sets: [group][rotation]."""
    k, channels = selection.pairs.shape
    pairs = selection.pairs.view(k, channels // g, g // 2, 2).tolist()
    free = selection.free.view(k, channels // g, g // 2).tolist()
    return [
        [{tuple(p) for p, ok in zip(pairs[r][n], free[r][n], strict=True) if ok} for r in range(k)]
        for n in range(channels // g)
    ]


def sequential_walk(rank: torch.Tensor, k: int) -> list[set[tuple[int, int]]]:
    """Algorithm A1 for one group as the paper states it: rank [g, g], one set of pairs for each rotation."""
    g = len(rank)
    ranked = sorted(((i, j) for i in range(g) for j in range(i + 1, g)), key=lambda pair: rank[pair].item())
    used: set[tuple[int, int]] = set()
    chosen = []
    for _ in range(k):
        taken: set[tuple[int, int]] = set()
        busy: set[int] = set()
        for i, j in ranked:
            if i not in busy and j not in busy and (i, j) not in used:
                taken.add((i, j))
                busy |= {i, j}
            if len(taken) == g // 2:
                break
        used |= taken
        chosen.append(taken)
    return chosen


@given(sizes, rotations, seeds)
def test_every_rotation_pairs_every_channel_of_a_group_once(g, k, seed):
    selection = select(g, k, seed)
    assert selection.pairs.shape == (k, 2 * g)
    assert selection.pairs.dtype == torch.int16
    by_group = selection.pairs.view(-1, g).sort(-1).values
    assert torch.equal(by_group, torch.arange(g, dtype=torch.int16).expand_as(by_group))


@given(sizes, rotations, seeds)
def test_the_lower_channel_of_a_pair_comes_first(g, k, seed):
    pairs = select(g, k, seed).pairs.view(-1, 2)
    assert (pairs[:, 0] < pairs[:, 1]).all()


@given(sizes, rotations, seeds)
def test_no_genuine_pair_repeats_in_a_group(g, k, seed):
    for group in genuine(select(g, k, seed), g):
        assert len(set().union(*group)) == sum(map(len, group))


@given(sizes, rotations, seeds)
def test_channels_are_left_alone_only_when_all_their_pairs_are_used(g, k, seed):
    selection = select(g, k, seed, groups=1)
    (group,) = genuine(selection, g)
    for r in range(k):
        lonely = selection.pairs[r].view(-1, 2)[~selection.free[r]].flatten().tolist()
        earlier = set().union(*group[:r])
        assert all((i, j) in earlier for i in lonely for j in lonely if i < j)


@given(sizes, seeds)
def test_the_first_rotation_leaves_no_channel_alone(g, seed):
    assert select(g, 1, seed).free.all()


@given(sizes, rotations, seeds)
def test_the_same_seed_gives_the_same_pairs(g, k, seed):
    first, second = select(g, k, seed), select(g, k, seed)
    assert torch.equal(first.pairs, second.pairs)
    assert torch.equal(first.free, second.free)


@given(sizes, st.integers(1, 16), seeds)
def test_seeds_and_groups_differ(g, k, seed):
    pairs = select(g, k, seed).pairs
    assert not torch.equal(pairs, select(g, k, seed + 1).pairs)
    assert not torch.equal(pairs[:, :g], pairs[:, g:])


@given(sizes, st.integers(1, 15), seeds)
def test_fewer_rotations_are_the_first_of_more(g, k, seed):
    assert torch.equal(select(g, k, seed).pairs, select(g, k + 1, seed).pairs[:k])


@pytest.mark.parametrize("g", GROUP_SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_random_selection_equals_the_sequential_walk(g, seed):
    rank = random_rank(2, g, torch.Generator().manual_seed(seed))
    found = genuine(select_pairs(rank, 16), g)
    assert found == [sequential_walk(rank[group], 16) for group in range(2)]


@pytest.mark.parametrize("g", GROUP_SIZES)
def test_magnitude_selection_equals_the_sequential_walk(g, generator):
    rank = magnitude_rank(torch.rand(2 * g, generator=generator).exp(), g)
    found = genuine(select_pairs(rank, 16), g)
    assert found == [sequential_walk(rank[group], 16) for group in range(2)]


@pytest.mark.parametrize("g", GROUP_SIZES)
def test_random_rank_numbers_all_pairs_of_each_group(g, generator):
    rank = random_rank(3, g, generator)
    assert torch.equal(rank, rank.mT)
    i, j = torch.triu_indices(g, g, offset=1)
    in_order = rank[:, i, j].sort(-1).values
    assert torch.equal(in_order, torch.arange(g * (g - 1) // 2).expand_as(in_order).float())
    assert rank.diagonal(dim1=1, dim2=2).isinf().all()


@given(sizes, seeds)
def test_magnitude_puts_the_largest_difference_first(g, seed):
    magnitude = torch.rand(2 * g, generator=torch.Generator().manual_seed(seed))
    first_rotation = [group[0] for group in genuine(select_pairs(magnitude_rank(magnitude, g), 1), g)]
    for values, pairs in zip(magnitude.view(2, g), first_rotation, strict=True):
        assert tuple(sorted((values.argmin().item(), values.argmax().item()))) in pairs


@given(sizes, seeds)
def test_magnitude_rank_falls_with_the_difference(g, seed):
    magnitude = torch.rand(g, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    i, j = torch.triu_indices(g, g, offset=1)
    in_order = magnitude_rank(magnitude, g)[0, i, j].argsort()
    difference = (magnitude[i] - magnitude[j]).abs()[in_order]
    assert (difference.diff() <= 0).all()


def test_equal_magnitudes_still_give_a_perfect_matching():
    selection = select_pairs(magnitude_rank(torch.ones(64), 32), 4)
    assert torch.equal(selection.pairs.view(-1, 32).sort(-1).values[0], torch.arange(32, dtype=torch.int16))


def test_selecting_leaves_the_rank_as_it_was(generator):
    rank = random_rank(2, 32, generator)
    before = rank.clone()
    select_pairs(rank, 8)
    assert torch.equal(rank, before)
