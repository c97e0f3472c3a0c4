"""Measure which tiles are fastest for a shape on this GPU; `pairquant tune` saves the result in the user's table (`table`)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...support.errors import ResourceError
from . import launch, table
from .layout import KernelLayout
from .table import Choice, Dense, Narrow, Wide
from .weights import MOST_PROGRAMS, KernelWeights, RotationWeights

#: Measures the milliseconds of one call that starts with an empty L2 cache.
Timer = Callable[[Callable[[], object]], float]


def candidates(tokens: int) -> list[Choice]:
    """List the tiles to try for up to this many tokens: those that were fastest for a shape on an H100, and similar ones."""
    if tokens <= 8:
        tiles = [(32, 2, 3), (32, 2, 4), (32, 4, 4), (32, 4, 5), (16, 4, 5), (16, 8, 4), (64, 2, 4)]
        return [
            Narrow(rows, warps, split, stages, overlap)
            for rows, warps, stages in tiles
            for split in (1, 2, 4, 8)
            for overlap in (False, True)
        ]
    width = max(16, min(128, tokens))
    wide: list[Choice] = [
        Wide(rows, width, warps, stages, waves)
        for rows, warps in ((64, 4), (128, 4), (128, 8))
        for stages in (2, 3, 4)
        for waves in (1, 2, 3, 4)
    ]
    if tokens > 128:
        wide += [Wide(128, 256, 8, 3), table.DENSE, Dense(4096)]
    return wide


def random_weights(
    out_features: tuple[int, ...],
    channels: int,
    group_size: int,
    device: torch.device,
    rotations: int = 8,
    transforms: int = 1,
    bits: int = 4,
) -> KernelWeights:
    """Make random codes, scales, zero points and rotations in the kernels' layout; transforms: 1, or one per linear."""
    layout = KernelLayout(channels, out_features, group_size)
    shape = (layout.padded_rows // 16, layout.k_blocks, 64 * bits)
    words = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=device)
    scales = torch.rand(layout.grid_rows, layout.padded_rows, device=device).mul_(0.01).half().view(torch.int16)
    zeros = torch.randint(0, 2**bits, scales.shape, dtype=torch.int32, device=device)
    order = torch.rand(transforms, rotations, channels // group_size, group_size, device=device).argsort(-1)
    rotation = RotationWeights.build(
        torch.randn(transforms, rotations, channels // 2, device=device),
        order.view(transforms, rotations, channels).to(torch.int16),
        torch.rand(transforms, channels, device=device).add_(0.5).half(),
        group_size,
    )
    arrivals = torch.zeros(max(MOST_PROGRAMS, shape[0]), dtype=torch.int32, device=device)
    grid = scales.to(torch.int32).bitwise_and_(0xFFFF) | (zeros << 16)
    return launch.with_matrix(KernelWeights(words, grid, arrivals, rotation, out_features))


def tune_shape(
    out_features: tuple[int, ...],
    channels: int,
    group_size: int,
    device: torch.device,
    timer: Timer | None = None,
    bits: int = 4,
) -> dict[int, Choice]:
    """Find the fastest choice for each range of `table.TOKENS`.

    timer: measures a call; None: the median of Triton's `do_bench`. Raises `ResourceError` if no choice for a range runs.
    """
    timer = timer or _median
    weights = random_weights(out_features, channels, group_size, device, bits=bits)
    found = {}
    for tokens in table.TOKENS:
        x = torch.randn(tokens, channels, device=device, dtype=torch.half)
        times: dict[Choice, float] = {}
        for choice in candidates(tokens):
            try:
                times[choice] = timer(lambda choice=choice, x=x: launch.linear(x, weights, None, choice))  # type: ignore[misc]
            except Exception as error:  # Triton has no common class for too little shared memory or too few registers
                failure = error
        if not times:
            raise ResourceError(f"no tile for {tokens} tokens runs on {device}: {failure}")
        found[tokens] = min(times, key=times.__getitem__)
    return found


def _median(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(call, return_mode="median")
