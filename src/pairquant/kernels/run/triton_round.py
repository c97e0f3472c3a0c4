"""A Triton kernel that rounds rotated activations to 8 bits, with one scale for each token (`core.activations`).

The scale of a token needs its largest magnitude over all channels, but rotations are computed block by block. So there are
two kernels: the rotation stores each block relative to its own largest magnitude, in float16, and those magnitudes
(`triton_rotate.relative`); this kernel, which knows all of them, rounds.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from .triton_bytes import ROUNDING, as_float8

#: `core.activations.MIN_SCALE`.
MIN_SCALE = tl.constexpr(1e-30)


@triton.jit(do_not_specialize=["rows", "blocks"])
def round_kernel(
    relative_ptr,  # float16 [R, 128 KB], R = T · M: each block divided by its peak, the channels in their usual order
    peaks_ptr,  # float32 [R, KB]
    out_ptr,  # [R, 128 KB]: codes, int8 or float8e4nv, or if VALUES code · scale, 16-bit
    scales_ptr,  # float32 [R], written unless VALUES
    rows,
    blocks,
    FLOAT8: tl.constexpr,  # round to float8_e4m3fn, else to int8
    VALUES: tl.constexpr,
    MMA_ORDER: tl.constexpr,  # store values in `triton_rotate.mma_order`
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of 128 channels in each program
    ALL_BLOCKS: tl.constexpr,  # at least KB
    DEPENDENT: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Round BLOCKS blocks of ROWS tokens."""
    largest: tl.constexpr = 448.0 if FLOAT8 else 127.0
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    every = tl.arange(0, ALL_BLOCKS)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    c = tl.arange(0, 128)
    here = (row < rows)[:, None]
    if DEPENDENT:
        tl_cuda.gdc_wait()
        tl_cuda.gdc_launch_dependents()
    peaks = tl.load(
        peaks_ptr + row[:, None] * blocks + every[None, :], mask=here & (every < blocks)[None, :], other=0.0
    )
    scale = tl.maximum(tl.max(peaks, 1) / largest, MIN_SCALE)
    inside = here & (block < blocks)[None, :]
    factor = tl.load(peaks_ptr + row[:, None] * blocks + block[None, :], mask=inside, other=0.0) / scale[:, None]
    at = (row.to(tl.int64)[:, None] * blocks + block[None, :])[:, :, None] * 128
    x = tl.load(relative_ptr + at + c[None, None, :], mask=inside[:, :, None], other=0.0).to(tl.float32)
    x = x * factor[:, :, None]
    if FLOAT8:
        codes = as_float8(tl.minimum(tl.maximum(x, -largest), largest), NATIVE)
    else:
        codes = ((x + ROUNDING) - ROUNDING).to(tl.int8)
    if VALUES:
        values = codes.to(tl.float32) * scale[:, None, None]
        if MMA_ORDER:
            values = tl.permute(tl.reshape(values, (ROWS, BLOCKS * 8, 4, 2, 2)), (0, 1, 3, 2, 4))  # t i1 i0 → i1 t i0
            values = tl.reshape(values, (ROWS, BLOCKS, 128))
        tl.store(out_ptr + at + c[None, None, :], values.to(out_ptr.dtype.element_ty), mask=inside[:, :, None])
    else:
        tl.store(out_ptr + at + c[None, None, :], codes, mask=inside[:, :, None])
        if tl.program_id(1) == 0:
            tl.store(scales_ptr + row, scale, mask=row < rows)
