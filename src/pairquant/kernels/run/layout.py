"""The layout of linears in GPU memory while the Triton kernels run them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

#: The rows of each linear are padded to a multiple of this, the largest row tile, so that no tile has rows of two linears.
KERNEL_ROWS = 128


@dataclass(frozen=True)
class KernelLayout:
    """The layout, in memory, of linears that read the same input. Checkpoints store them differently.

    In this layout a warp reads 16 bytes per lane without gaps, and every code is loaded by the lane that passes it to the
    tensor cores, so that unpacking moves no data between lanes. The output rows of each linear are padded to a multiple of
    `KERNEL_ROWS`, and the input channels to a multiple of 128, with codes and scales of zero.

    words: int32 [NP / 16, KB, 64 b] for NP padded rows, KB blocks of 128 channels and codes of b bits. They stand for one or two
    words of nibbles, [rh 2, r 8, t 4, c 4], of which each holds eight codes, or parts of codes, of row 16 R + 8 rh + r: nibble i0 · 4 + h · 2 + i1 is channel 128 kb + 32 c + 16 h + 4 t + 2 i1 + i0. So a lane
    (r, t) of an m16n8k16 product has two neighbouring channels in the two halves of a word, and four bit operations turn
    these into pairs of 16-bit floats.

    The low nibbles (bits 0 to 3 of the codes) come first, then the high ones. Nibbles of which only two bits can be set are stored
    in half as many words, those of rh = 0 in bits 0 and 1 and those of rh = 1 in bits 2 and 3; nibbles with one bit in a quarter
    as many: word i holds those of words 2 i + k in bit k + 2 rh. Codes of 3 bits are stored as two bits, then one; of 5, 6 and
    8 bits as four, then one, two, four.

    grid: int32 [KB · S, NP] for S = 128 / g groups per block. The low 16 bits are the scale's float16 bits; the zero point
    is shifted left by 16. Codes in MXFP4 have no zero points: their grid is float32, the scales alone, which tells kernels
    what the codes are; g then is the size of a block, 32. Smaller numbers could not be loaded ahead of their use.

    `wide_kernel` needs the channels of x in another order, because it reads x from shared memory in the order that the
    tensor cores prescribe: in each run of 16 channels, channel 4 t + 2 i1 + i0 is at place 8 i1 + 2 t + i0.
    """

    in_features: int
    out_features: tuple[int, ...]
    group_size: int

    @cached_property
    def k_blocks(self) -> int:
        return -(-self.in_features // 128)

    @cached_property
    def groups_per_block(self) -> int:
        return 128 // self.group_size

    @property
    def grid_rows(self) -> int:
        return self.k_blocks * self.groups_per_block

    @staticmethod
    def padded(rows: int) -> int:
        """Round a number of rows up to a multiple of `KERNEL_ROWS`."""
        return -(-rows // KERNEL_ROWS) * KERNEL_ROWS

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first padded row of each linear."""
        ends = list(itertools.accumulate(self.padded(rows) for rows in self.out_features))
        return (0, *ends[:-1])

    @cached_property
    def padded_rows(self) -> int:
        return sum(self.padded(rows) for rows in self.out_features)

    @cached_property
    def segments(self) -> tuple[int, ...]:
        """start1 and start2 in tiles of 128 rows, and size0, size1 and size2 in units of 8 rows, for the kernels."""
        row_tiles = self.padded_rows // 128
        starts = (*(start // 128 for start in self.starts[1:]), row_tiles, row_tiles)[:2]
        sizes = (*(size // 8 for size in self.out_features), 0, 0)[:3]
        return starts + sizes

    def real_rows(self, start: int, end: int) -> int:
        """Count the rows in [start, end), in padded rows, that are not padding."""
        spans = ((first, first + rows) for first, rows in zip(self.starts, self.out_features, strict=True))
        return sum(max(0, min(end, stop) - max(start, first)) for first, stop in spans)
