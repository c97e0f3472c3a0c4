"""Launch the Triton kernels that run experts. The caller must have checked the tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .expert_weights import ExpertWeights
from .launch import cdiv, dependent, features, rotate_padded, stages_for
from .start import start
from .triton_experts import assign_kernel, combine_kernel, narrow_experts_kernel, wide_experts_kernel


@dataclass(frozen=True)
class ExpertTiles:
    """How experts are multiplied.

    tokens: assignments in a tile, 1 if nothing is sorted; rows: of the weight in a tile; warps, stages: of a program; wide: the
    kernel, `wide_experts_kernel` or `narrow_experts_kernel`; prefetch: blocks of 128 channels that the latter loads
    into the cache while it waits.
    """

    tokens: int
    rows: int
    warps: int
    stages: int
    wide: bool = False
    prefetch: int = 0


#: Up to this many assignments each is a tile of its own; beyond, tiles by the mean number of assignments of an expert. The
#: fastest on an H100 for 128 experts of 2048 → 768 → 2048 (benchmarks/bench_experts.py).
SINGLE = ExpertTiles(1, 32, 2, 4)
SINGLE_MOST = 48
BY_MEAN = (
    (6, ExpertTiles(8, 32, 2, 3)),
    (10, ExpertTiles(16, 128, 4, 3, wide=True)),
    (24, ExpertTiles(32, 128, 4, 3, wide=True)),
    (64, ExpertTiles(64, 128, 4, 3, wide=True)),
    (float("inf"), ExpertTiles(128, 128, 4, 3, wide=True)),
)


def choose(assignments: int, experts: int) -> ExpertTiles:
    """Return the tiles for a number of assignments to a number of experts."""
    if assignments <= SINGLE_MOST:
        return SINGLE
    return next(tiles for most, tiles in BY_MEAN if assignments <= most * experts)


def token_counts(experts: int) -> list[int]:
    """Return a number of assignments for each of the tiles that `choose` knows."""
    bounds = [SINGLE_MOST, *(int(most * experts) for most, _ in BY_MEAN[:-1])]
    return [*bounds, max(bounds) + 1]


@dataclass(frozen=True)
class Assignments:
    """Which expert multiplies what.

    ids: integers [A], the expert of each assignment; owners: the expert of each tile; members: int32 [tiles · tokens], the
    assignments of each tile, not read if each is a tile of its own.
    """

    ids: Tensor
    owners: Tensor
    members: Tensor
    tiles: ExpertTiles


def assign(ids: Tensor, experts: int, tiles: ExpertTiles) -> Assignments:
    """Sort the assignments; ids: integers [T, k], of which those that are negative or not below `experts` stand for none."""
    ids = ids.reshape(-1)
    if tiles.tokens == 1:
        return Assignments(ids, ids, ids, tiles)
    count, most = ids.numel(), most_tiles(ids.numel(), experts, tiles)
    owners = torch.empty(most, dtype=torch.int32, device=ids.device)
    members = torch.empty(most * tiles.tokens, dtype=torch.int32, device=ids.device)
    bins = max(2, 1 << experts.bit_length())
    numbers = (count, experts, most)
    start(assign_kernel, (experts, 1, 1), (ids, members, owners), numbers, BINS=bins, BM=tiles.tokens)
    return Assignments(ids, owners, members, tiles)


def most_tiles(assignments: int, experts: int, tiles: ExpertTiles) -> int:
    """Return how many tiles are needed at most: every expert may have one that is not full, but none is empty."""
    return min(assignments, experts) + max(0, assignments - experts) // tiles.tokens


def product(x: Tensor, weights: ExpertWeights, given: Assignments, share: int, activation: str = "") -> Tensor:
    """Rotate x, round it to the weights' format and multiply each assignment by its expert: [A, N] in x's dtype.

    Rows without an expert are not written. Products are of 16 bits, also of activations that are rounded.

    x: 16-bit [A / share, C], the row a // share is that of assignment a, or with an activation (see
    `triton_rotate.load_input`) [A / share, 2 C].
    """
    layout, tiles = weights.layout, given.tiles
    if weights.activations:
        from .launch_rounded import values  # needs a newer Triton than the other kernels

        x_rot = values(x, weights.each.rotation, weights.activations, tiles.wide, activation)
    else:
        x_rot = rotate_padded(x, weights.each.rotation, tiles.wide, True, activation)
    out = torch.empty(given.ids.numel(), sum(layout.out_features), dtype=x.dtype, device=x.device)
    bias = out if weights.bias is None else weights.bias
    tensors = (x_rot, weights.each.words, weights.each.grid, bias, out, given.owners, given.members)
    sizes = (layout.k_blocks, layout.padded_rows // 128, out.shape[1] // 8, *layout.segments)
    in_stage = (tiles.rows, tiles.tokens, 1) if tiles.wide else (tiles.rows, 0, tiles.warps)
    options = {
        "BN": tiles.rows,
        "STAGES": stages_for(tiles.stages, weights.each.bits, *in_stage, x.device),
        "GROUPS": layout.groups_per_block,
        "BITS": weights.each.bits,
        "HAS_BIAS": weights.bias is not None,
        "NATIVE": features(x.device)["NATIVE"],
        "num_warps": tiles.warps,
        **dependent(x.device),
    }
    grid = (layout.padded_rows // tiles.rows, given.owners.numel(), 1)
    numbers = (given.ids.numel(), weights.count, share, *sizes)
    if tiles.wide:
        start(wide_experts_kernel, grid, tensors, numbers, **options, BM=tiles.tokens)
    else:
        start(
            narrow_experts_kernel,
            grid,
            tensors,
            (*numbers, tiles.prefetch),
            **options,
            BM=max(8, tiles.tokens),
            WARPS=tiles.warps,
            ONE=tiles.tokens == 1,
            EVEN=layout.k_blocks % tiles.warps == 0,
        )
    return out


def combine(y: Tensor, weights: Tensor, ids: Tensor, experts: int) -> Tensor:
    """Sum the weighted outputs of each token: y [A, N] → [T, N]; weights, ids: [T, k]."""
    (tokens, chosen), columns = ids.shape, 512
    out = torch.empty(tokens, y.shape[1], dtype=y.dtype, device=y.device)
    start(
        combine_kernel,
        (tokens, cdiv(y.shape[1], columns), 1),
        (y, ids, weights, out),
        (experts, chosen, y.shape[1]),
        COLUMNS=columns,
        num_warps=4,
        **dependent(y.device),
    )
    return out
