"""Rounding a rotated weight to the grid, with the inputs' second moments as the measure of what an error costs.

All functions minimise (part of) the quadratic proxy tr(E H Eᵀ), E = W - Ŵ, H = XᵀX in the same basis as W:

- `search_range`: each group's range, shrunk when clipping its extremes costs less than the finer grid saves;
- `nearest`: each weight by itself;
- `gptq`: columns in turn, each error compensated on the columns still to come (Frantar et al., 2023);
- `refine`: coordinate descent from there, group by group: re-round every column given all the others, refit the scale.

Shapes: w [N, C] float32, hessian [C, C], codes uint8 [N, C], grid scale and zero [N, G].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..support.errors import CalibrationError
from .grid import MIN_SCALE, affine_parameters, dequantize, group_range, quantize

#: A relative error of a layer's output from which on a user must be told: rounding alone stays far below it.
POOR_ERROR = 0.2
#: Columns compensated one by one before the rest is updated by one matrix product.
BLOCK = 64


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of every row and group, [N, G] float32; scales already have their stored fp16 values."""

    scale: Tensor
    zero: Tensor
    bits: int

    @classmethod
    def spanning(cls, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Grid:
        """Return the grid whose ends are `low` and `high` [N, G]."""
        scale, zero = affine_parameters(low, high, bits, symmetric)
        return cls(stored(scale), zero, bits)

    def codes(self, w: Tensor) -> Tensor:
        return quantize(w, self.scale, self.zero, self.bits)

    def values(self, codes: Tensor) -> Tensor:
        return dequantize(codes, self.scale, self.zero)


def stored(x: Tensor) -> Tensor:
    """Return the values that fp16 storage keeps."""
    return x.half().to(x.dtype)


def nearest(w: Tensor, grid: Grid) -> Tensor:
    """Return codes of the nearest grid points."""
    return grid.codes(w)


def search_range(
    w: Tensor, hessian: Tensor | None, bits: int, group_size: int, symmetric: bool, shrinks: tuple[float, ...] = (1.0,)
) -> Grid:
    """Return for each row and group the range, among `shrinks` times its min and max, that has the least error after rounding.

    The error counts within the group only: e H_gg eᵀ, with H_gg the group's g × g block of the Hessian (identity
    when there is none).
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
    """Return rounds B columns in turn, each one's error compensated on those after it: codes uint8 and errors, both [B, N].

    todo: the columns as the rows of [B, N], changed in place; factor: upper triangular [B, B], of `inverse_factor`;
    scale, zero: [B, N]; top: the largest code.
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
    """Round the g columns of one group again, one after another, each given all the others (see `refine`).

    k = q - z and m = Mᵀ: [g, N], changed in place; local: the group's block of H, [g, g]; curvature: its diagonal,
    positive, [g]; scale, and lowest and highest, the bounds of k: [N].
    """
    for i in range(len(k)):
        best = (k[i] + m[i] / (curvature[i] * scale)).round_().clamp_(lowest, highest)
        m.addr_(local[i], (best - k[i]) * scale, alpha=-1)
        k[i] = best


@dataclass(frozen=True)
class Solvers:
    """The loops that go column by column: `compensate` and `descend`, or what does the same faster."""

    compensate: Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]] = compensate
    descend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None] = descend


#: In plain PyTorch, for any device.
SOLVERS = Solvers()


def gptq(
    w: Tensor, hessian: Tensor, grid: Grid, damping: float, by_activation: bool, solvers: Solvers = SOLVERS
) -> Tensor:
    """Return codes by error compensation, on a grid fixed beforehand.

    by_activation: treat the columns with the largest diagonal of H first, while many others can still compensate.
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
    """Coordinate descent on tr(E H Eᵀ): returns the new (grid, codes). The error never grows, but for fp16 scales.

    With M = E H, moving column i of Ŵ by d changes the error by d² H_ii - 2 d M_i: the best grid point is the one
    nearest to ŵ_i + M_i / H_ii. Likewise the best change of a group's scale is (k · M_g) / (k H_gg kᵀ), k = q - z.
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
    """Upper triangular U with (H + d·mean(diag H)·I)⁻¹ = Uᵀ U, float64; the damping grows tenfold until it factors."""
    return _damped(hessian, damping, _upper_of_inverse)


def damped_cholesky(hessian: Tensor, damping: float) -> Tensor:
    """Lower triangular L with H + d·mean(diag H)·I = L Lᵀ, float64; the damping grows tenfold until it factors."""
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
        "the calibration activations are degenerate. Use more or other calibration text."
    )


def _plus_diagonal(hessian: Tensor, value: Tensor) -> Tensor:
    """Return a copy in float64."""
    damped = hessian.to(torch.float64, copy=True)
    damped.diagonal().add_(value)
    return damped


def _upper_of_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """With rows and columns in reverse, J H J = L Lᵀ, so H = V Vᵀ for V = J L J upper triangular, and U = V⁻¹ = J L⁻¹ J:
    half the work of inverting H and factoring that. Three matrices of H's size at once, for the largest take gigabytes.
    """
    size, dtype, device = len(matrix), matrix.dtype, matrix.device
    backwards = matrix.flip(0, 1)
    del matrix  # the caller keeps none
    lower, failed = torch.linalg.cholesky_ex(backwards)
    del backwards
    if failed or not lower.isfinite().all():  # the inverse of infinity would be a plausible zero
        return lower, failed
    inverse = torch.eye(size, dtype=dtype, device=device).mT  # by columns, as the solver writes: solved in place
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.flip(0, 1), failed


def proxy_error(w: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """tr(E H Eᵀ) / tr(W H Wᵀ), the relative squared error of the layer's output over the calibration text."""
    return ratio(proxy_terms(w, approximation, hessian))


def proxy_terms(w: Tensor, approximation: Tensor, hessian: Tensor) -> Tensor:
    """tr(E H Eᵀ) and tr(W H Wᵀ), whose `ratio` is `proxy_error`: sums over the rows of w, [2]."""
    error = w - approximation
    return torch.stack((((error @ hessian) * error).sum(), ((w @ hessian) * w).sum()))


def ratio(terms: Tensor) -> float:
    """Return the first of two numbers over the second, which may be zero."""
    return (terms[0] / terms[1].clamp(min=1e-30)).item()


def poor_errors(errors: Mapping[str, float | None]) -> dict[str, float]:
    """Return those of these errors, by path, that are above `POOR_ERROR`, worst first."""
    poor = {path: error for path, error in errors.items() if error is not None and error > POOR_ERROR}
    return dict(sorted(poor.items(), key=lambda item: -item[1]))


def _per_column(grid: Grid, channels: int, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every column, [C, N], in the given order."""
    g = channels // grid.scale.shape[1]
    group = torch.arange(channels, device=grid.scale.device) // g
    group = group if order is None else group[order]
    return grid.scale.T[group], grid.zero.T[group]


def _diagonal_blocks(hessian: Tensor, group_size: int) -> Tensor:
    """Return the [G, g, g] blocks on the diagonal of H [C, C]."""
    num_groups = len(hessian) // group_size
    return hessian.view(num_groups, group_size, num_groups, group_size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _group_cost(w: Tensor, grid: Grid, blocks: Tensor | None) -> Tensor:
    """e H_gg eᵀ of every row and group, [N, G]."""
    error = (w - grid.values(grid.codes(w))).view(*grid.scale.shape, -1).transpose(0, 1)  # [G, N, g]
    weighted = error @ blocks.to(w.dtype) if blocks is not None else error
    return (weighted * error).sum(-1).T
