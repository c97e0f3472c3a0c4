"""How 4-bit linears lie in GPU memory while the Triton kernels run them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

#: Rows to which the kernels pad each linear: the largest row tile, so that no tile holds rows of two linears.
KERNEL_ROWS = 128


@dataclass(frozen=True)
class KernelLayout:
    """How 4-bit linears that read the same input lie in memory while kernels run them (not how they are stored).

    Chosen so that a warp reads 16 bytes per lane, without gaps, and every nibble is already in the lane that feeds it
    to the tensor cores; unpacking then moves no data. Output rows are padded to `KERNEL_ROWS` per linear, input
    channels to 128, with zero codes and zero scales.

    words: int32 [NP / 16, KB, rh 2, r 8, t 4, c 4] for NP padded rows and KB blocks of 128 channels. The word holds
    eight codes of row 16 R + 8 rh + r: nibble i0 · 4 + h · 2 + i1 is channel 128 kb + 32 c + 16 h + 4 t + 2 i1 + i0.
    A lane (r, t) of an m16n8k16 product thus finds two neighbouring channels in the two halves of a word, which four
    bit operations turn into pairs of 16-bit floats.

    grid: int32 [KB · S, NP] for S = 128 / g groups per block: the scale's float16 bits, and the zero point << 16.

    `wide_kernel` needs the channels of x in another order, in each run of 16: channel 4 t + 2 i1 + i0 at place
    8 i1 + 2 t + i0 (its operand comes from shared memory, where the tensor cores fix the order).
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
        return -(-rows // KERNEL_ROWS) * KERNEL_ROWS

    @property
    def starts(self) -> tuple[int, ...]:
        """First padded row of each linear."""
        ends = list(itertools.accumulate(self.padded(rows) for rows in self.out_features))
        return (0, *ends[:-1])

    @property
    def padded_rows(self) -> int:
        return sum(self.padded(rows) for rows in self.out_features)

    def real_rows(self, start: int, end: int) -> int:
        """Return how many of the padded rows [start, end) are not padding."""
        spans = ((first, first + rows) for first, rows in zip(self.starts, self.out_features, strict=True))
        return sum(max(0, min(end, stop) - max(start, first)) for first, stop in spans)
