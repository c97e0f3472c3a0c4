"""Round a rotated weight to the grid; the second moments of its inputs tell how much each error costs.

All functions minimise the quadratic proxy tr(E H Eᵀ) or a part of it, with E = W - Ŵ and H = XᵀX in the same basis as W:

- `search_grid` chooses each group's range, or the power of two of each block; it shrinks them if clipping the extremes costs
  less than the finer grid saves;
- `nearest` rounds each weight on its own;
- `gptq` rounds the columns in turn and compensates each error in the columns that follow (Frantar et al., 2023);
- `refine` improves the result by coordinate descent, group by group: it rounds every column again, given all the others,
  then refits the group's scale.

Shapes: w [N, C] float32, hessian [C, C], codes uint8 [N, C], scales of a grid [N, G].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..spec.linear import Spec
from ..spec.mx import LEAST_EXPONENT, MOST_EXPONENT, MX_BLOCK
from ..support.errors import CalibrationError
from .grid import group_range
from .grids import Grid, MxGrid, WholeGrid, better_of
from .mx import e2m1, floor_scale

AnyGrid = TypeVar("AnyGrid", bound=Grid)
#: The user is told of layers whose relative output error is above this; rounding alone stays far below it.
POOR_ERROR = 0.2
#: Columns that `gptq` rounds one by one before it updates all later columns by one matrix product.
BLOCK = 64


def nearest(w: Tensor, grid: Grid) -> Tensor:
    """Return the codes of the grid points nearest to w [N, C]: uint8 [N, C]."""
    return grid.codes(w)


def search_grid(w: Tensor, hessian: Tensor | None, spec: Spec, shrinks: tuple[float, ...] = (1.0,)) -> Grid:
    """Choose the grid of each row and group with the least error after rounding, of those that `shrinks` leaves to try.

    Only errors within the group count: e H_gg eᵀ, where H_gg is the group's g × g block of the Hessian, or the identity if
    there is no Hessian.
    """
    if spec.weights is not None:
        return _least(w, hessian, [MxGrid(scale) for scale in _powers(w, more=len(shrinks) > 1)])
    return search_range(w, hessian, spec.bits, spec.group_size, spec.symmetric, shrinks)


def search_range(
    w: Tensor, hessian: Tensor | None, bits: int, group_size: int, symmetric: bool, shrinks: tuple[float, ...] = (1.0,)
) -> WholeGrid:
    """Choose for each row and group the range, out of `shrinks` times min and max, with the least error (see `search_grid`)."""
    low, high = group_range(w, group_size)
    return _least(w, hessian, [WholeGrid.spanning(low * s, high * s, bits, symmetric) for s in shrinks])


def _powers(w: Tensor, more: bool) -> list[Tensor]:
    """Return the scales to try for blocks of MXFP4, [N, G] each: the specification's, and with `more` its double and half.

    The specification's cuts off what is above 6 scales, up to a quarter of the largest magnitude; its double cuts nothing off.
    """
    scale = floor_scale(w.unflatten(1, (-1, MX_BLOCK)).abs().amax(-1))
    factors = (1.0, 2.0, 0.5) if more else (1.0,)
    return [(scale * factor).clamp(2.0**LEAST_EXPONENT, 2.0**MOST_EXPONENT) for factor in factors]


def _least(w: Tensor, hessian: Tensor | None, grids: Sequence[AnyGrid]) -> AnyGrid:
    """Return, of each row and group, the grid with the least cost; of equal ones the first."""
    best, *others = grids
    if not others:
        return best
    blocks = _diagonal_blocks(hessian, w.shape[1] // best.scale.shape[1]) if hessian is not None else None
    best_cost = _group_cost(w, best, blocks)
    for grid in others:
        cost = _group_cost(w, grid, blocks)
        better = cost < best_cost
        best_cost, best = torch.where(better, cost, best_cost), better_of(best, grid, better)
    return best


def compensate(
    todo: Tensor, factor: Tensor, scale: Tensor, lowest: Tensor, span: float, floating: bool = False
) -> tuple[Tensor, Tensor]:
    """Round B columns in turn and compensate the error of each in those that follow.

    todo: the columns of w as rows, [B, N], changed in place; factor: upper triangular [B, B], a block of what
    `inverse_factor` returns; scale, lowest: of the grid, [B, N]; span, floating: see `Grid`. Returns the steps k and the
    errors, both [B, N] in the dtype of todo.
    """
    rounded = e2m1 if floating else torch.round
    steps, errors = torch.empty_like(todo), torch.empty_like(todo)
    for i in range(len(todo)):
        step = rounded(todo[i] / scale[i]).sub_(lowest[i]).clamp_(0, span).add_(lowest[i])
        steps[i] = step
        error = (todo[i] - step * scale[i]) / factor[i, i]
        todo[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)
        errors[i] = error
    return steps, errors


def descend(
    k: Tensor,
    m: Tensor,
    local: Tensor,
    curvature: Tensor,
    scale: Tensor,
    lowest: Tensor,
    highest: Tensor,
    floating: bool = False,
) -> None:
    """Round the g columns of one group again, in turn, each given all the others (see `refine`).

    k, m: the steps and the transpose of M, [g, N], changed in place; local: the group's block of H, [g, g]; curvature: its
    diagonal, positive, [g]; scale: [N]; lowest, highest: the bounds of k, [N]; floating: see `Grid`.
    """
    rounded = e2m1 if floating else torch.round
    for i in range(len(k)):
        best = rounded(k[i] + m[i] / (curvature[i] * scale)).clamp_(lowest, highest)
        m.addr_(local[i], (best - k[i]) * scale, alpha=-1)
        k[i] = best


@dataclass(frozen=True)
class Solvers:
    """The loops that go column by column: `compensate` and `descend`, or faster functions that do the same."""

    compensate: Callable[[Tensor, Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]] = compensate
    descend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool], None] = descend


#: The loops in plain PyTorch, for any device.
SOLVERS = Solvers()


def gptq(
    w: Tensor, hessian: Tensor, grid: Grid, damping: float, by_activation: bool, solvers: Solvers = SOLVERS
) -> Tensor:
    """Round w [N, C] by error compensation on a given grid, and return the codes, uint8 [N, C] (Frantar et al., 2023).

    hessian: [C, C]; damping: see `inverse_factor`; by_activation: round the columns with the largest diagonal of H first,
    while many other columns can still compensate their errors. Raises `CalibrationError` if H cannot be factored.
    """
    order = (
        hessian.diagonal().argsort(descending=True) if by_activation else torch.arange(len(hessian), device=w.device)
    )
    factor = inverse_factor(hessian[order][:, order], damping).to(w.dtype)
    todo = w.T[order].contiguous()  # [C, N]: one column of w is one contiguous row here
    scale, lowest = _per_column(grid, w.shape[1], order)
    codes = torch.empty_like(todo, dtype=torch.uint8)
    for start in range(0, len(todo), BLOCK):
        end = min(start + BLOCK, len(todo))
        block = slice(start, end)
        steps, errors = solvers.compensate(
            todo[block], factor[block, block], scale[block], lowest[block], grid.span, grid.floating
        )
        codes[block] = grid.codes_of(steps, lowest[block])
        todo[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return codes[order.argsort()].T.contiguous()


def refine(
    w: Tensor,
    hessian: Tensor,
    grid: Grid,
    codes: Tensor,
    sweeps: int,
    refit_scales: bool = True,
    solvers: Solvers = SOLVERS,
) -> tuple[Grid, Tensor]:
    """Reduce tr(E H Eᵀ) by coordinate descent, in `sweeps` passes, and return the new grid and codes.

    The error never grows, except that rounding the refitted scales to fp16 can add a little. With M = E H, moving column i
    of Ŵ by d changes the error by d² H_ii - 2 d M_i, so the best grid point is the one nearest to ŵ_i + M_i / H_ii.
    Likewise, the best change of a group's scale is (k · M_g) / (k H_gg kᵀ), where k = q - z.
    """
    channels, g = w.shape[1], w.shape[1] // grid.scale.shape[1]
    hessian = hessian.to(w.dtype)
    curvature = hessian.diagonal().clamp(min=1e-12)
    steps = grid.steps(codes).to(w.dtype).T  # k, [C, N]
    scale, every_lowest = grid.scale.T.clone(), grid.lowest.T  # [G, N]
    slope = hessian @ (w.T - steps * scale.repeat_interleave(g, 0))  # Mᵀ, [C, N]
    for _ in range(sweeps):
        for group in range(channels // g):
            columns = slice(group * g, (group + 1) * g)
            s, lowest = scale[group], every_lowest[group]
            k, m, local = steps[columns], slope[columns].clone(), hessian[columns, columns]
            before = k * s
            solvers.descend(k, m, local, curvature[columns], s, lowest, lowest + grid.span, grid.floating)
            if refit_scales:
                gain = (k * m).sum(0) / (k * (local @ k)).sum(0).clamp(min=1e-12)
                scale[group] = grid.storable(s + gain)
            slope.addmm_(hessian[:, columns], k * scale[group] - before, alpha=-1)
    codes = grid.codes_of(steps, every_lowest.repeat_interleave(g, 0)).T.contiguous()
    return replace(grid, scale=scale.T.contiguous()), codes


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U, float64, with (H + d · mean(diag H) · I)⁻¹ = Uᵀ U.

    The damping d starts at `damping`, and is multiplied by ten until H can be factored. Raises `CalibrationError` if that
    fails eight times.
    """
    return _damped(hessian, damping, _upper_of_inverse)


def damped_cholesky(hessian: Tensor, damping: float) -> Tensor:
    """Return the lower triangular L, float64, with H + d · mean(diag H) · I = L Lᵀ (for d see `inverse_factor`)."""
    return _damped(hessian, damping, torch.linalg.cholesky_ex)


def _damped(hessian: Tensor, damping: float, factorize: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    level = hessian.diagonal().double().mean().clamp(min=1e-12)
    damping = max(damping, 1e-8)
    for attempt in range(8):
        factor, failed = factorize(_plus_diagonal(hessian, level * damping * 10**attempt))
        if not failed and factor.isfinite().all():
            return factor
    raise CalibrationError(
        f"a {len(hessian)} × {len(hessian)} Hessian is not positive definite even with damping {damping * 1e7:g}: "
        "the layer's inputs on the calibration text are probably too large or not finite. Use other calibration text."
    )


def _plus_diagonal(hessian: Tensor, value: Tensor) -> Tensor:
    """Return a float64 copy of H with `value` added to its diagonal."""
    damped = hessian.to(torch.float64, copy=True)
    damped.diagonal().add_(value)
    return damped


def _upper_of_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return U with H⁻¹ = Uᵀ U for a matrix H, and whether factoring failed (not zero).

    Let J reverse the order of rows or columns, and J H J = L Lᵀ. Then H = V Vᵀ for the upper triangular V = J L J, and
    U = V⁻¹ = J L⁻¹ J. This is half the work of inverting H and factoring the inverse. Matrices are deleted as early as
    possible, because three matrices of the size of the largest H take gigabytes.
    """
    size, dtype, device = len(matrix), matrix.dtype, matrix.device
    backwards = matrix.flip(0, 1)
    del matrix  # the caller holds no reference, so this frees it
    lower, failed = torch.linalg.cholesky_ex(backwards)
    del backwards
    if failed or not lower.isfinite().all():  # inverting an infinity would give zero and hide it
        return lower, failed
    # Transposed, because the solver writes by columns and can then work in place.
    inverse = torch.eye(size, dtype=dtype, device=device).mT
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.flip(0, 1), failed


def proxy_error(w: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """Return tr(E H Eᵀ) / tr(W H Wᵀ), the relative squared error of the layer's output over the calibration text."""
    return ratio(proxy_terms(w, approximation, hessian))


def proxy_terms(w: Tensor, approximation: Tensor, hessian: Tensor) -> Tensor:
    """Return tr(E H Eᵀ) and tr(W H Wᵀ) as a tensor [2]; its `ratio` is `proxy_error`.

    Both are sums over the rows of w, so the terms of parts of w can be added.
    """
    error = w - approximation
    return torch.stack((((error @ hessian) * error).sum(), ((w @ hessian) * w).sum()))


def ratio(terms: Tensor) -> float:
    """Divide the first of two numbers [2] by the second, which may be zero: it is raised to at least 1e-30."""
    return (terms[0] / terms[1].clamp(min=1e-30)).item()


def poor_errors(errors: Mapping[str, float | None]) -> dict[str, float]:
    """Return the errors that are above `POOR_ERROR`, by path, the largest first."""
    poor = {path: error for path, error in errors.items() if error is not None and error > POOR_ERROR}
    return dict(sorted(poor.items(), key=lambda item: -item[1]))


def _per_column(grid: Grid, channels: int, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the scale and the lowest step of every column, both [C, N], with the columns in the given order."""
    g = channels // grid.scale.shape[1]
    group = torch.arange(channels, device=grid.scale.device) // g
    group = group if order is None else group[order]
    return grid.scale.T[group], grid.lowest.T[group]


def _diagonal_blocks(hessian: Tensor, group_size: int) -> Tensor:
    """Return the blocks on the diagonal of H [C, C]: [G, g, g]."""
    num_groups = len(hessian) // group_size
    return hessian.view(num_groups, group_size, num_groups, group_size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _group_cost(w: Tensor, grid: Grid, blocks: Tensor | None) -> Tensor:
    """Compute the cost e H_gg eᵀ of every row and group, [N, G]; blocks: H_gg, None for the identity."""
    error = (w - grid.values(grid.codes(w))).view(*grid.scale.shape, -1).transpose(0, 1)  # [G, N, g]
    weighted = error @ blocks.to(w.dtype) if blocks is not None else error
    return (weighted * error).sum(-1).T
