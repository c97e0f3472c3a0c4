"""Triton kernels that multiply tokens by the packed weights of the experts that they were given to.

An assignment is a token with one of its experts: token t has the assignments t · k … t · k + k - 1. Each program computes
some rows of one expert for a tile of its assignments. For few tokens every assignment is a tile of its own, so that nothing
has to be sorted; for more, `assign_kernel` sorts the assignments by expert.

Each sum is always added up in the same order. So the same batch gives the same bits; in another batch a token's output can
differ by rounding, because another kernel may be chosen.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from .triton_linear import prefetch, segment, store_rows
from .triton_rotate import dot
from .triton_unpack import load_nibbles, narrow_product, wide_weight

#: Assignments that `assign_kernel` looks at in one step.
CHUNK = tl.constexpr(1024)


@triton.jit(do_not_specialize=["assignments", "experts", "tiles"])
def assign_kernel(
    ids_ptr,  # integers [A]: the expert of each assignment; one that is negative or not below `experts` stands for none
    members_ptr,  # int32 [tiles · BM]: the assignments of each tile; A where a tile has fewer
    owners_ptr,  # int32 [tiles]: the expert of each tile; -1 for tiles that are not needed
    assignments,
    experts,
    tiles,
    BINS: tl.constexpr,  # a power of two above the number of experts
    BM: tl.constexpr,
):
    """Sort the assignments by expert into tiles of BM; each program writes the tiles of one expert, in order."""
    expert = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, assignments, CHUNK):
        ids = tl.load(ids_ptr + start + lane, mask=start + lane < assignments, other=-1).to(tl.int32)
        counts += tl.histogram(tl.where((ids >= 0) & (ids < experts), ids, BINS - 1), BINS)
    needed = tl.where(bins < experts, (counts + BM - 1) // BM, 0)
    first = tl.sum(tl.where(bins < expert, needed, 0), 0)
    own = tl.sum(tl.where(bins == expert, needed, 0), 0)
    for start in range(0, own, CHUNK):
        tl.store(owners_ptr + first + start + lane, expert + lane * 0, mask=start + lane < own)
    place = first * BM
    for start in range(0, assignments, CHUNK):
        ids = tl.load(ids_ptr + start + lane, mask=start + lane < assignments, other=-1).to(tl.int32)
        mine = (ids == expert).to(tl.int32)
        tl.store(members_ptr + place + tl.cumsum(mine, 0) - 1, start + lane, mask=mine > 0)
        place += tl.sum(mine, 0)
    rest = place + tl.arange(0, BM)
    tl.store(members_ptr + rest, assignments + rest * 0, mask=rest < (first + own) * BM)
    if expert == experts - 1:
        for start in range(first + own, tiles, CHUNK):
            tl.store(owners_ptr + start + lane, lane * 0 - 1, mask=start + lane < tiles)


#: Arguments whose values must not lead to new variants of a kernel.
SIZES = [
    "assignments",
    "experts",
    "share",
    "k_blocks",
    "row_tiles",
    "octets",
    "start1",
    "start2",
    "size0",
    "size1",
    "size2",
]


@triton.jit(do_not_specialize=[*SIZES, "ahead"])
def narrow_experts_kernel(
    x_ptr,  # 16-bit [A / share, 128 KB]: rotated, the channels in their usual order
    words_ptr,  # int32 [E, NP / 16, KB, 64 BITS] (layout.KernelLayout)
    grid_ptr,  # int32 [E, KB · S, NP]
    bias_ptr,  # [E, N], of any dtype
    out_ptr,  # [A, N]
    owners_ptr,  # the expert of each tile
    members_ptr,  # int32 [tiles · BM]: the assignments of each tile; not read if ONE
    assignments,  # A
    experts,  # E
    share,  # assignments that read the same row of x
    k_blocks,
    row_tiles,  # NP / 128
    octets,  # N / 8
    start1,
    start2,
    size0,
    size1,
    size2,
    ahead,  # blocks of 128 channels to prefetch
    BN: tl.constexpr,
    BM: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,  # WARPS divides k_blocks
    ONE: tl.constexpr,  # every assignment is a tile of its own
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Compute the product for BN rows of an expert and a tile of its assignments; each warp sums a part of the channels."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    padded_rows = row_tiles * 128
    tile = tl.program_id(0)
    # The kernel before this one has waited for the router, so that this may be read before waiting for it.
    expert = tl.load(owners_ptr + tl.program_id(1)).to(tl.int32)
    real_expert = (expert >= 0) & (expert < experts)
    expert = tl.where(real_expert, expert, 0).to(tl.int64)
    words_ptr += expert * (row_tiles * 8 * 64 * BITS) * k_blocks
    if DEPENDENT:
        if (ahead > 0) & real_expert:
            first_fragment = tile * (BN // 16) * k_blocks
            prefetch(words_ptr, first_fragment, k_blocks, tl.minimum(k_blocks, ahead), BN, WARPS, 64 * BITS)
        tl_cuda.gdc_wait()
    if not real_expert:
        return
    part = tl.arange(0, WARPS)
    n = tile * BN + tl.arange(0, BN)
    fragment = (tile * (BN // 16) + tl.arange(0, BN // 16)) * k_blocks
    words_at = words_ptr + fragment[None, :, None] * (64 * BITS)
    grid_ptr += expert * (k_blocks * GROUPS) * padded_rows
    channel = tl.arange(0, 128)
    s = tl.arange(0, GROUPS)
    m = tl.arange(0, BM)
    if ONE:
        member = tl.where(m == 0, tl.program_id(1), assignments)
        x_row = (tl.program_id(1) // share).to(tl.int64) * (k_blocks * 128)
    else:
        member = tl.load(members_ptr + tl.program_id(1) * BM + m)
        x_rows = (member // share).to(tl.int64) * (k_blocks * 128)
    acc = tl.zeros((WARPS, BN, BM), tl.float32)
    for block in tl.range(0, k_blocks, WARPS, num_stages=STAGES):
        kb = block + part
        grid_at = grid_ptr + (kb[:, None] * GROUPS + s[None, :])[:, None, :] * padded_rows + n[None, :, None]
        here = kb < k_blocks
        block_at = words_at + kb[:, None, None] * (64 * BITS)
        words, high = load_nibbles(block_at, here[:, None, None], WARPS, BN // 16, BITS, EVEN)
        grid = tl.load(grid_at) if EVEN else tl.load(grid_at, mask=here[:, None, None], other=0)
        if ONE:
            x = tl.load(x_ptr + x_row + kb[:, None] * 128 + channel[None, :], mask=here[:, None], other=0.0)
            x = tl.broadcast_to(x[:, :, None], (WARPS, 128, BM))
        else:
            x_at = x_ptr + x_rows[None, None, :] + kb[:, None, None] * 128 + channel[None, :, None]
            x = tl.load(x_at, mask=(member < assignments)[None, None, :] & here[:, None, None], other=0.0)
        acc += narrow_product(words, high, grid, x, WARPS, BN, GROUPS, BITS, dtype, NATIVE)
    if DEPENDENT:
        tl_cuda.gdc_launch_dependents()
    _, first, size, column = segment(tile * BN, start1, start2, size0, size1, size2)
    bias_ptr += expert * (octets * 8)
    store_rows(tl.sum(acc, 0), out_ptr, bias_ptr, n - first, size, column, member, assignments, octets * 8, HAS_BIAS)


@triton.jit(do_not_specialize=SIZES)
def wide_experts_kernel(
    x_ptr,  # 16-bit [A / share, 128 KB]: rotated, in `mma_order`
    words_ptr,
    grid_ptr,
    bias_ptr,
    out_ptr,
    owners_ptr,
    members_ptr,
    assignments,
    experts,
    share,
    k_blocks,
    row_tiles,
    octets,
    start1,
    start2,
    size0,
    size1,
    size2,
    BN: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Compute the product for BN rows of an expert and a tile of BM of its assignments."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    padded_rows = row_tiles * 128
    tile = tl.program_id(0)
    if DEPENDENT:
        tl_cuda.gdc_wait()
        tl_cuda.gdc_launch_dependents()
    expert = tl.load(owners_ptr + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    member = tl.load(members_ptr + tl.program_id(1) * BM + tl.arange(0, BM))
    real = member < assignments
    n = tile * BN + tl.arange(0, BN)
    fragment = (expert * (row_tiles * 8) + tile * (BN // 16) + tl.arange(0, BN // 16)) * k_blocks
    words_at = words_ptr + fragment[None, :, None] * (64 * BITS)
    grid_at = grid_ptr + expert * (k_blocks * GROUPS) * padded_rows + n[:, None]
    s = tl.arange(0, GROUPS)
    x_rows = (member // share).to(tl.int64) * (k_blocks * 128)
    x_at = x_ptr + x_rows[None, :] + tl.arange(0, 128)[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for kb in tl.range(0, k_blocks, num_stages=STAGES):
        words, high = load_nibbles(words_at + kb * (64 * BITS), True, 1, BN // 16, BITS, True)
        grid = tl.load(grid_at + (kb * GROUPS + s)[None, :] * padded_rows)
        x = tl.load(x_at + kb * 128, mask=real[None, :], other=0.0)
        weight = wide_weight(words, high, grid, True, BN, GROUPS, BITS, dtype, NATIVE)
        acc = tl.dot(weight, x, acc) if NATIVE else acc + dot(weight, x, NATIVE)
    _, first, size, column = segment(tile * BN, start1, start2, size0, size1, size2)
    bias_ptr += expert * (octets * 8)
    store_rows(acc, out_ptr, bias_ptr, n - first, size, column, member, assignments, octets * 8, HAS_BIAS)


@triton.jit(do_not_specialize=["experts", "chosen", "features"])
def combine_kernel(
    y_ptr,  # [A, N]
    ids_ptr,  # integers [A]
    weights_ptr,  # [A]
    out_ptr,  # [T, N] in y's dtype
    experts,
    chosen,  # k
    features,  # N
    COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Sum each token's outputs, weighted; those of ids that stand for no expert count nothing. float32 inside."""
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if DEPENDENT:
        tl_cuda.gdc_wait()
        tl_cuda.gdc_launch_dependents()
    total = tl.zeros((COLUMNS,), tl.float32)
    for one in range(chosen):
        at = token * chosen + one
        expert = tl.load(ids_ptr + at)
        real = column < tl.where((expert >= 0) & (expert < experts), features, 0)
        weight = tl.load(weights_ptr + at).to(tl.float32)
        total += weight * tl.load(y_ptr + at.to(tl.int64) * features + column, mask=real, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + token.to(tl.int64) * features + column, total.to(out_ptr.dtype.element_ty), mask=column < features
    )
