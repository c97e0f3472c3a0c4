"""Which kernel with which tile, by device class, shape and number of tokens: a measured table, never a search at run time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Narrow:
    """`narrow_kernel`: rows per program, warps (each takes its own part of K), programs that share K, buffered stages,
    blocks prefetched before the rotation is done."""

    rows: int
    warps: int
    split: int = 1
    stages: int = 3
    prefetch: int = 0
    fused: bool = False


@dataclass(frozen=True)
class Wide:
    """`wide_kernel`: rows and tokens per tile, warps, buffered stages, programs per multiprocessor."""

    rows: int
    tokens: int
    warps: int
    stages: int = 3
    waves: int = 1
    prefetch: int = 0


@dataclass(frozen=True)
class Dense:
    """Decode `rows` rows at a time into a workspace, then a dense product."""

    rows: int
