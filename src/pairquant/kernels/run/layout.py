"""The layout of 4-bit linears in GPU memory while the Triton kernels run them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

#: The rows of each linear are padded to a multiple of this, the largest row tile, so that no tile has rows of two linears.
KERNEL_ROWS = 128


@dataclass(frozen=True)
class KernelLayout:
    """The layout, in memory, of 4-bit linears that read the same input. Checkpoints store them differently.

    In this layout a warp reads 16 bytes per lane without gaps, and every code is loaded by the lane that passes it to the
    tensor cores, so that unpacking moves no data between lanes. The output rows of each linear are padded to a multiple of
    `KERNEL_ROWS`, and the input channels to a multiple of 128, with codes and scales of zero.

    words: int32 [NP / 16, KB, rh 2, r 8, t 4, c 4] for NP padded rows and KB blocks of 128 channels. Each word holds eight
    codes of row 16 R + 8 rh + r: nibble i0 · 4 + h · 2 + i1 is channel 128 kb + 32 c + 16 h + 4 t + 2 i1 + i0. So a lane
    (r, t) of an m16n8k16 product has two neighbouring channels in the two halves of a word, and four bit operations turn
    these into pairs of 16-bit floats.

    grid: int32 [KB · S, NP] for S = 128 / g groups per block. The low 16 bits are the scale's float16 bits; the zero point
    is shifted left by 16.

    `wide_kernel` needs the channels of x in another order, because it reads x from shared memory in the order that the
    tensor cores prescribe: in each run of 16 channels, channel 4 t + 2 i1 + i0 is at place 8 i1 + 2 t + i0.
    """

    in_features: int
    out_features: tuple[int, ...]
    group_size: int

    @property
    def k_blocks(self) -> int:
        return -(-self.in_features // 128)

    @property
    def groups_per_block(self) -> int:
        return 128 // self.group_size

    @property
    def grid_rows(self) -> int:
        return self.k_blocks * self.groups_per_block

    @staticmethod
    def padded(rows: int) -> int:
        """Round a number of rows up to a multiple of `KERNEL_ROWS`."""
        return -(-rows // KERNEL_ROWS) * KERNEL_ROWS

    @property
    def starts(self) -> tuple[int, ...]:
        """The first padded row of each linear."""
        ends = list(itertools.accumulate(self.padded(rows) for rows in self.out_features))
        return (0, *ends[:-1])

    @property
    def padded_rows(self) -> int:
        return sum(self.padded(rows) for rows in self.out_features)

    def real_rows(self, start: int, end: int) -> int:
        """Count the rows in [start, end), in padded rows, that are not padding."""
        spans = ((first, first + rows) for first, rows in zip(self.starts, self.out_features, strict=True))
        return sum(max(0, min(end, stop) - max(start, first)) for first, stop in spans)
