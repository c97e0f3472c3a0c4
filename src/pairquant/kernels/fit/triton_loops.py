"""Triton kernels for fitting and rounding: fake quantization with its gradient, and the loops of `core.rounding` that go
column by column.

In those loops each step depends on the one before, so the time that a step takes from start to end decides the speed. One
warp keeps all columns of ROWS rows in registers; with eight rows, four lanes share the columns of a row. To read one column,
a kernel sums over all columns with the others set to zero: each lane sums its quarter, and two shuffles add the quarters.
What a step reads from memory is loaded one step earlier. Each lane loads a part, and all lanes get it through shared memory;
no step has to wait for that.

Rounding and division give exactly the results of PyTorch. A scale that fp16 can store times a step of a grid is exact in
float32, so the result is the same when the compiler fuses this product with an addition.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def clamp(x, low, high):
    """Do the same as torch.clamp, where NaN stays NaN."""
    return tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_even(x):
    """Round like torch.round, half to even, up to 2²¹; a larger number gives 2²¹, which is far beyond any code.

    1.5 · 2²³ plus a number below 2²² lies between 2²³ and 2²⁴, where float32 can only hold integers, so adding it rounds.
    """
    return (clamp(x, -2097152.0, 2097152.0) + 12582912.0) - 12582912.0


@triton.jit
def nearest_step(x, FLOATING: tl.constexpr):
    """Round x, in units of its scale, to a whole number, or if FLOATING to a value of E2M1; both half to even, unbounded."""
    if FLOATING:
        magnitude = tl.abs(x)
        step = tl.where(magnitude < 2.0, 0.5, tl.where(magnitude < 4.0, 1.0, 2.0))
        return round_even(x / step) * step  # a power of two: the division is exact
    return round_even(x)


@triton.jit
def compensate_step(factor_ptr, scale_ptr, lowest_ptr, j, columns, rows, n, column, stride):
    """Load what column j needs: its row of the factor [B], that row's diagonal entry, its scales and lowest steps [ROWS]."""
    real = n < rows
    line = tl.load(factor_ptr + j * stride + column, mask=column < columns, other=0.0)
    pivot = tl.load(factor_ptr + j * (stride + 1))
    at = j * rows.to(tl.int64) + n
    return line, pivot, tl.load(scale_ptr + at, mask=real, other=1.0), tl.load(lowest_ptr + at, mask=real, other=0.0)


@triton.jit(do_not_specialize=["span", "columns", "rows", "stride"])
def compensate_kernel(
    todo_ptr,  # float32 [columns, N]
    factor_ptr,  # float32 [columns, columns], stride 1 along a row; what is below the diagonal is not used
    scale_ptr,  # float32 [columns, N]
    lowest_ptr,  # float32 [columns, N]
    steps_ptr,  # float32 [columns, N], written
    errors_ptr,  # float32 [columns, N], written
    span,  # from the lowest step to the highest
    columns,
    rows,  # N
    stride,  # of the factor's rows
    B: tl.constexpr,  # at least `columns`
    ROWS: tl.constexpr,
    FLOATING: tl.constexpr,
):
    """Do for ROWS rows of the weight what `core.rounding.compensate` does."""
    column = tl.arange(0, B)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (column < columns)[:, None] & (n < rows)[None, :]
    todo = tl.load(todo_ptr + column.to(tl.int64)[:, None] * rows + n[None, :], mask=inside, other=0.0)
    line, pivot, scale, lowest = compensate_step(factor_ptr, scale_ptr, lowest_ptr, 0, columns, rows, n, column, stride)
    for j in range(columns):
        spread = line[:, None]  # early, so that it has passed through shared memory before it is needed
        next_line, next_pivot, next_scale, next_lowest = compensate_step(
            factor_ptr, scale_ptr, lowest_ptr, tl.minimum(j + 1, columns - 1), columns, rows, n, column, stride
        )
        w = tl.sum(tl.where(column[:, None] == j, todo, 0.0), axis=0)
        step = clamp(nearest_step(tl.math.div_rn(w, scale), FLOATING), lowest, lowest + span)
        error = tl.math.div_rn(w - step * scale, pivot)
        todo -= spread * error[None, :]  # columns up to j are now wrong, but are not read again
        at = j * rows.to(tl.int64) + n
        tl.store(steps_ptr + at, step, mask=n < rows)
        tl.store(errors_ptr + at, error, mask=n < rows)
        line, pivot, scale, lowest = next_line, next_pivot, next_scale, next_lowest


@triton.jit
def descend_step(k_ptr, local_ptr, curvature_ptr, j, columns, rows, n, column, k_stride, k_row_stride, stride):
    """Load what column j needs: its row of the Hessian [G], its curvature, its steps [ROWS]."""
    line = tl.load(local_ptr + j * stride + column, mask=column < columns, other=0.0)
    curvature = tl.load(curvature_ptr + j)
    at = j * k_stride.to(tl.int64) + n * k_row_stride.to(tl.int64)
    return line, curvature, tl.load(k_ptr + at, mask=n < rows, other=0.0)


@triton.jit(do_not_specialize=["columns", "rows", "k_stride", "k_row_stride", "m_stride", "stride"])
def descend_kernel(
    k_ptr,  # float32 [columns, N], any strides; changed
    m_ptr,  # float32 [columns, N], stride 1 along N; changed
    local_ptr,  # float32 [columns, columns], stride 1 along a row
    curvature_ptr,  # float32 [columns], positive
    scale_ptr,  # float32 [N]
    lowest_ptr,  # float32 [N], the bounds of k
    highest_ptr,  # float32 [N]
    columns,
    rows,  # N
    k_stride,
    k_row_stride,
    m_stride,
    stride,  # of the Hessian's rows
    G: tl.constexpr,  # at least `columns`
    ROWS: tl.constexpr,
    FLOATING: tl.constexpr,
):
    """Do for ROWS rows of the weight what `core.rounding.descend` does."""
    column = tl.arange(0, G)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = n < rows
    inside = (column < columns)[:, None] & real[None, :]
    m_at = m_ptr + column.to(tl.int64)[:, None] * m_stride + n[None, :]
    m = tl.load(m_at, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + n, mask=real, other=1.0)
    lowest = tl.load(lowest_ptr + n, mask=real, other=0.0)
    highest = tl.load(highest_ptr + n, mask=real, other=0.0)
    line, curvature, k = descend_step(
        k_ptr, local_ptr, curvature_ptr, 0, columns, rows, n, column, k_stride, k_row_stride, stride
    )
    for j in range(columns):
        spread = line[:, None]  # early, so that it has passed through shared memory before it is needed
        next_line, next_curvature, next_k = descend_step(
            k_ptr,
            local_ptr,
            curvature_ptr,
            tl.minimum(j + 1, columns - 1),
            columns,
            rows,
            n,
            column,
            k_stride,
            k_row_stride,
            stride,
        )
        slope = tl.sum(tl.where(column[:, None] == j, m, 0.0), axis=0)
        best = clamp(nearest_step(k + tl.math.div_rn(slope, curvature * scale), FLOATING), lowest, highest)
        m -= spread * ((best - k) * scale)[None, :]
        tl.store(k_ptr + j * k_stride.to(tl.int64) + n * k_row_stride.to(tl.int64), best, mask=real)
        line, curvature, k = next_line, next_curvature, next_k
    tl.store(m_at, m, mask=inside)


@triton.jit
def spanning(w, TOP: tl.constexpr, SYMMETRIC: tl.constexpr, MIN_SCALE: tl.constexpr):
    """Return low, high, scale and zero point of groups w [T, g], all [T] (see `group_range`, `affine_parameters` in core)."""
    low = tl.minimum(tl.min(w, axis=1), 0.0)
    high = tl.maximum(tl.max(w, axis=1), 0.0)
    if SYMMETRIC:
        half: tl.constexpr = (TOP + 1) // 2
        reach: tl.constexpr = half - 1 if half > 1 else 1
        scale = tl.maximum(tl.math.div_rn(tl.maximum(-low, high), reach * 1.0), MIN_SCALE)
        zero = tl.full(scale.shape, half, tl.float32)
    else:
        scale = tl.maximum(tl.math.div_rn(high - low, TOP * 1.0), MIN_SCALE)
        zero = clamp(-round_even(tl.math.div_rn(low, scale)), 0.0, TOP * 1.0)
    return low, high, scale, zero


@triton.jit(do_not_specialize=["groups"])
def fake_quantize_kernel(
    w_ptr,  # float32 [groups, g]
    out_ptr,  # float32 [groups, g], written
    groups,
    G: tl.constexpr,  # group size
    TILE: tl.constexpr,  # groups per program
    TOP: tl.constexpr,  # the largest code
    SYMMETRIC: tl.constexpr,
    MIN_SCALE: tl.constexpr,
):
    """Round TILE groups to the nearest grid points, with the range of each group."""
    group = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    at = group[:, None] * G + tl.arange(0, G)[None, :]
    inside = (group < groups)[:, None]
    w = tl.load(w_ptr + at, mask=inside, other=0.0)
    _, _, scale, zero = spanning(w, TOP, SYMMETRIC, MIN_SCALE)
    zero = zero[:, None]
    steps = clamp(round_even(tl.math.div_rn(w, scale[:, None])) + zero, 0.0, TOP * 1.0) - zero
    tl.store(out_ptr + at, steps * scale[:, None], mask=inside)


@triton.jit(do_not_specialize=["groups"])
def fake_quantize_backward_kernel(
    w_ptr,  # float32 [groups, g]
    grad_ptr,  # float32 [groups, g]
    grad_w_ptr,  # float32 [groups, g], written
    groups,
    G: tl.constexpr,
    TILE: tl.constexpr,
    TOP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    MIN_SCALE: tl.constexpr,
):
    """Compute the gradient of w for TILE groups, as `core.grid.FakeQuantize.backward` does."""
    group = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    at = group[:, None] * G + tl.arange(0, G)[None, :]
    inside = (group < groups)[:, None]
    w = tl.load(w_ptr + at, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
    low, high, scale, zero = spanning(w, TOP, SYMMETRIC, MIN_SCALE)
    ratio = tl.math.div_rn(w, scale[:, None])
    steps = clamp(round_even(ratio) + zero[:, None], 0.0, TOP * 1.0) - zero[:, None]
    slope = tl.where(scale > MIN_SCALE, tl.sum(grad * (steps - ratio), axis=1), 0.0)
    if SYMMETRIC:
        half: tl.constexpr = (TOP + 1) // 2
        reach: tl.constexpr = half - 1 if half > 1 else 1
        pull = shared(slope / reach, tl.abs(w) == tl.maximum(-low, high)[:, None])
        grad += tl.where(w < 0, -pull, pull)
    else:
        grad += shared(slope / TOP, w == high[:, None]) - shared(slope / TOP, w == low[:, None])
    tl.store(grad_w_ptr + at, grad, mask=inside)


@triton.jit
def shared(amount, at_extreme):
    """Distribute `amount` [T] in equal parts over the marked elements of each row of [T, g]; the others get zero."""
    count = tl.sum(at_extreme.to(tl.float32), axis=1)
    return tl.where(at_extreme, (amount / tl.maximum(count, 1.0))[:, None], 0.0)
