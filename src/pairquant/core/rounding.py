"""Round a rotated weight to the grid; the second moments of its inputs tell how much each error costs.

All functions minimise the quadratic proxy tr(E H Eᵀ) or a part of it, with E = W - Ŵ and H = XᵀX in the same basis as W:

- `search_range` chooses each group's range; it shrinks a range if clipping the extremes costs less than the finer grid
  saves;
- `nearest` rounds each weight on its own;
- `gptq` rounds the columns in turn and compensates each error in the columns that follow (Frantar et al., 2023);
- `refine` improves the result by coordinate descent, group by group: it rounds every column again, given all the others,
  then refits the group's scale.

Shapes: w [N, C] float32, hessian [C, C], codes uint8 [N, C], grid scale and zero [N, G].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..support.errors import CalibrationError
from .grid import MIN_SCALE, affine_parameters, dequantize, group_range, quantize

#: The user is told of layers whose relative output error is above this; rounding alone stays far below it.
POOR_ERROR = 0.2
#: Columns that `gptq` rounds one by one before it updates all later columns by one matrix product.
BLOCK = 64


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of every row and group, float32 [N, G]; the scales are already rounded to fp16."""

    scale: Tensor
    zero: Tensor
    bits: int

    @classmethod
    def spanning(cls, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Grid:
        """Make the grid whose ends are `low` and `high` [N, G]."""
        scale, zero = affine_parameters(low, high, bits, symmetric)
        return cls(stored(scale), zero, bits)

    def codes(self, w: Tensor) -> Tensor:
        """Return the codes of the grid points nearest to w [N, C]: uint8 [N, C]."""
        return quantize(w, self.scale, self.zero, self.bits)

    def values(self, codes: Tensor) -> Tensor:
        """Return the weights that codes [N, C] stand for: float32 [N, C]."""
        return dequantize(codes, self.scale, self.zero)


def stored(x: Tensor) -> Tensor:
    """Round x to the values that fp16 can store; the result has x's dtype."""
    return x.half().to(x.dtype)


def nearest(w: Tensor, grid: Grid) -> Tensor:
    """Return the codes of the grid points nearest to w [N, C]: uint8 [N, C]."""
    return grid.codes(w)


def search_range(
    w: Tensor, hessian: Tensor | None, bits: int, group_size: int, symmetric: bool, shrinks: tuple[float, ...] = (1.0,)
) -> Grid:
    """Choose for each row and group the range, out of `shrinks` times min and max, with the least error after rounding.

    Only errors within the group count: e H_gg eᵀ, where H_gg is the group's g × g block of the Hessian, or the identity if
    there is no Hessian.
    """
    low, high = group_range(w, group_size)
    best = Grid.spanning(low * shrinks[0], high * shrinks[0], bits, symmetric)
    if len(shrinks) == 1:
        return best
    blocks = _diagonal_blocks(hessian, group_size) if hessian is not None else None
    best_cost = _group_cost(w, best, blocks)
    for shrink in shrinks[1:]:
        grid = Grid.spanning(low * shrink, high * shrink, bits, symmetric)
        cost = _group_cost(w, grid, blocks)
        better = cost < best_cost
        best_cost = torch.where(better, cost, best_cost)
        best = Grid(torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero), bits)
    return best


def compensate(todo: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Round B columns in turn and compensate the error of each in those that follow.

    todo: the columns of w as rows, [B, N], changed in place; factor: upper triangular [B, B], a block of what
    `inverse_factor` returns; scale, zero: [B, N]; top: the largest code. Returns the codes, uint8 [B, N], and the errors,
    [B, N].
    """
    codes, errors = torch.empty_like(todo, dtype=torch.uint8), torch.empty_like(todo)
    for i in range(len(todo)):
        code = (todo[i] / scale[i]).round_().add_(zero[i]).clamp_(0, top)
        codes[i] = code
        error = (todo[i] - (code - zero[i]) * scale[i]) / factor[i, i]
        todo[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)
        errors[i] = error
    return codes, errors


def descend(
    k: Tensor, m: Tensor, local: Tensor, curvature: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor
) -> None:
    """Round the g columns of one group again, in turn, each given all the others (see `refine`).

    k, m: q - z and the transpose of M, [g, N], changed in place; local: the group's block of H, [g, g]; curvature: its
    diagonal, positive, [g]; scale: [N]; lowest, highest: the bounds of k, [N].
    """
    for i in range(len(k)):
        best = (k[i] + m[i] / (curvature[i] * scale)).round_().clamp_(lowest, highest)
        m.addr_(local[i], (best - k[i]) * scale, alpha=-1)
        k[i] = best


@dataclass(frozen=True)
class Solvers:
    """The loops that go column by column: `compensate` and `descend`, or faster functions that do the same."""

    compensate: Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]] = compensate
    descend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None] = descend


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
    scale, zero = _per_column(grid, w.shape[1], order)
    codes = torch.empty_like(todo, dtype=torch.uint8)
    top = 2**grid.bits - 1
    for start in range(0, len(todo), BLOCK):
        end = min(start + BLOCK, len(todo))
        block = slice(start, end)
        codes[block], errors = solvers.compensate(todo[block], factor[block, block], scale[block], zero[block], top)
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
    steps = codes.T.to(w.dtype) - _per_column(grid, channels)[1]  # k = q - z, [C, N]
    scale, zero = grid.scale.T.clone(), grid.zero.T  # [G, N]
    slope = hessian @ (w.T - steps * scale.repeat_interleave(g, 0))  # Mᵀ, [C, N]
    for _ in range(sweeps):
        for group in range(channels // g):
            columns = slice(group * g, (group + 1) * g)
            s, lowest = scale[group], -zero[group]
            highest = lowest + 2**grid.bits - 1
            k, m, local = steps[columns], slope[columns].clone(), hessian[columns, columns]
            before = k * s
            solvers.descend(k, m, local, curvature[columns], s, lowest, highest)
            if refit_scales:
                gain = (k * m).sum(0) / (k * (local @ k)).sum(0).clamp(min=1e-12)
                scale[group] = stored((s + gain).clamp(min=MIN_SCALE))
            slope.addmm_(hessian[:, columns], k * scale[group] - before, alpha=-1)
    grid = Grid(scale.T.contiguous(), grid.zero, grid.bits)
    return grid, (steps + zero.repeat_interleave(g, 0)).T.to(torch.uint8).contiguous()


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
    """Return the scale and the zero point of every column, both [C, N], with the columns in the given order."""
    g = channels // grid.scale.shape[1]
    group = torch.arange(channels, device=grid.scale.device) // g
    group = group if order is None else group[order]
    return grid.scale.T[group], grid.zero.T[group]


def _diagonal_blocks(hessian: Tensor, group_size: int) -> Tensor:
    """Return the blocks on the diagonal of H [C, C]: [G, g, g]."""
    num_groups = len(hessian) // group_size
    return hessian.view(num_groups, group_size, num_groups, group_size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _group_cost(w: Tensor, grid: Grid, blocks: Tensor | None) -> Tensor:
    """Compute the cost e H_gg eᵀ of every row and group, [N, G]; blocks: H_gg, None for the identity."""
    error = (w - grid.values(grid.codes(w))).view(*grid.scale.shape, -1).transpose(0, 1)  # [G, N, g]
    weighted = error @ blocks.to(w.dtype) if blocks is not None else error
    return (weighted * error).sum(-1).T
