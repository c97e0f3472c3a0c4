"""Rounding to the grid: nearest, GPTQ against a naive column-by-column version, refinement, range search."""

import itertools

import pytest
import torch

from pairquant.core.grid import group_range
from pairquant.core.grids import WholeGrid, stored
from pairquant.core.mx import floor_scale
from pairquant.core.rounding import gptq, inverse_factor, nearest, proxy_error, refine, search_grid, search_range
from pairquant.spec.linear import Spec
from pairquant.spec.mx import E2M1
from pairquant.support.errors import CalibrationError

ORDERS = pytest.mark.parametrize("by_activation", [False, True], ids=["natural", "by_activation"])
DAMPING = 0.01


def correlated_hessian(channels: int, generator: torch.Generator) -> torch.Tensor:
    """Second moments of inputs that share a few strong directions, as real activations do: float32 [C, C]."""
    mixing = torch.randn(8, channels, generator=generator) * 2
    x = torch.randn(4 * channels, 8, generator=generator) @ mixing
    x += 0.5 * torch.randn(4 * channels, channels, generator=generator)
    return x.T @ x


def problem(generator, rows=24, channels=128, g=32, bits=4, symmetric=False):
    """A weight, a correlated Hessian, and the unshrunk grid."""
    w = torch.randn(rows, channels, generator=generator)
    return w, correlated_hessian(channels, generator), search_range(w, None, bits, g, symmetric)


def naive_gptq(w, hessian, grid, damping, by_activation):
    """Optimal brain quantization, column by column, as its papers state it: no blocks, no Cholesky factor; float64.

    After rounding column i, the others move by -error / P_ii · P_i, and P, the inverse of the damped Hessian, loses i.
    """
    channels = w.shape[1]
    g = channels // grid.scale.shape[1]
    todo, hessian = w.double().clone(), hessian.double()
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(channels).double())
    order = hessian.diagonal().argsort(descending=True) if by_activation else torch.arange(channels)
    codes = torch.zeros(w.shape)
    for i in order.tolist():
        scale, zero = grid.scale[:, i // g].double(), grid.zero[:, i // g].double()
        code = ((todo[:, i] / scale).round() + zero).clamp(0, 2**grid.bits - 1)
        error = todo[:, i] - (code - zero) * scale
        todo -= torch.outer(error, inverse[i] / inverse[i, i])
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        codes[:, i] = code
    return codes.to(torch.uint8)


def error_of(w, hessian, grid, codes) -> float:
    return proxy_error(w, grid.values(codes), hessian)


@ORDERS
@pytest.mark.parametrize(("channels", "g"), [(32, 32), (64, 32), (96, 32), (128, 64), (192, 64), (256, 128)])
@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_equals_the_naive_version(channels, g, bits, by_activation, generator):
    w, hessian, grid = problem(generator, rows=8, channels=channels, g=g, bits=bits)
    # In float64 on both sides: in float32 a weight halfway between two codes may fall to either.
    exact = WholeGrid(grid.scale.double(), grid.zero.double(), bits)
    codes = gptq(w.double(), hessian.double(), exact, DAMPING, by_activation)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes, naive_gptq(w, hessian, grid, DAMPING, by_activation))


@ORDERS
def test_gptq_in_float32_is_as_good_as_in_float64(by_activation, generator):
    w, hessian, grid = problem(generator)
    in_single = error_of(w, hessian, grid, gptq(w, hessian, grid, DAMPING, by_activation))
    in_double = error_of(w, hessian, grid, naive_gptq(w, hessian, grid, DAMPING, by_activation))
    assert in_single == pytest.approx(in_double, rel=0.02)  # a few codes in thousands may differ by one


@ORDERS
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_on_a_diagonal_hessian_is_nearest(bits, by_activation, generator):
    w, _, grid = problem(generator, bits=bits)
    hessian = torch.diag(torch.rand(128, generator=generator) + 0.1)
    assert torch.equal(gptq(w, hessian, grid, DAMPING, by_activation), nearest(w, grid))


@ORDERS
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_beats_nearest_on_a_correlated_hessian(bits, symmetric, by_activation, generator):
    w, hessian, grid = problem(generator, bits=bits, symmetric=symmetric)
    compensated = error_of(w, hessian, grid, gptq(w, hessian, grid, DAMPING, by_activation))
    assert compensated < 0.7 * error_of(w, hessian, grid, nearest(w, grid))


def test_gptq_rounds_each_row_by_itself(generator):
    w, hessian, grid = problem(generator, rows=6)
    together = gptq(w, hessian, grid, DAMPING, False)
    apart = [gptq(w[i : i + 1], hessian, _rows(grid, i), DAMPING, False) for i in range(6)]
    # One matrix product for many rows may round its sums differently from one for a single row.
    assert (together != torch.cat(apart)).float().mean() < 0.01


@ORDERS
def test_gptq_leaves_its_arguments_as_they_were(by_activation, generator):
    w, hessian, grid = problem(generator)
    before = [t.clone() for t in (w, hessian, grid.scale, grid.zero)]
    gptq(w, hessian, grid, DAMPING, by_activation)
    assert all(map(torch.equal, before, (w, hessian, grid.scale, grid.zero)))


SINGULAR = {
    "zeros": lambda x: torch.zeros(128, 128),
    "rank one": lambda x: torch.outer(x[0], x[0]),
    "fewer tokens than channels": lambda x: x[:20].T @ x[:20],
    "dead channels": lambda x: (
        torch.where(torch.arange(128) % 3 == 0, 0, x).T @ torch.where(torch.arange(128) % 3 == 0, 0, x)
    ),
    "huge": lambda x: 1e12 * torch.outer(x[0], x[0]),
    "minute": lambda x: 1e-12 * torch.outer(x[0], x[0]),
}


@ORDERS
@pytest.mark.parametrize("kind", SINGULAR)
def test_singular_hessians_are_damped(kind, by_activation, generator):
    w, _, grid = problem(generator)
    hessian = SINGULAR[kind](torch.randn(200, 128, generator=generator))
    codes = gptq(w, hessian, grid, DAMPING, by_activation)
    assert error_of(w, hessian, grid, codes) <= error_of(w, hessian, grid, nearest(w, grid))


def test_a_hessian_of_zeros_rounds_to_nearest(generator):
    w, _, grid = problem(generator)
    assert torch.equal(gptq(w, torch.zeros(128, 128), grid, DAMPING, False), nearest(w, grid))


def test_damping_grows_until_an_indefinite_hessian_factors(generator):
    hessian = correlated_hessian(32, generator)
    hessian -= 0.5 * hessian.diagonal().mean() * torch.eye(32)
    assert torch.linalg.eigvalsh(hessian)[0] < 0
    assert inverse_factor(hessian, DAMPING).isfinite().all()


def test_inverse_factor_is_the_triangular_root_of_the_inverse(generator):
    hessian = correlated_hessian(32, generator)
    factor = inverse_factor(hessian, DAMPING)
    assert factor.dtype == torch.float64
    assert torch.equal(factor, factor.triu())
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(32).double()
    # Condition number about 1e4: sixteen digits leave twelve.
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(32).double(), rtol=0, atol=1e-11)


@ORDERS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [(3, 3), (3, 90), None])
def test_a_hessian_that_is_not_finite_is_refused(where, value, by_activation, generator):
    w, hessian, grid = problem(generator)
    if where is None:
        hessian[:] = value
    else:
        hessian[where] = hessian[where[::-1]] = value
    with pytest.raises(CalibrationError, match=r"128 × 128 Hessian.*calibration"):
        gptq(w, hessian, grid, DAMPING, by_activation)


@pytest.mark.parametrize("refit_scales", [False, True])
@pytest.mark.parametrize("start", ["gptq", "nearest"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_refining_never_raises_the_error(bits, start, refit_scales, generator):
    w, hessian, grid = problem(generator, bits=bits)
    codes = gptq(w, hessian, grid, DAMPING, False) if start == "gptq" else nearest(w, grid)
    errors = [error_of(w, hessian, grid, codes)]
    for _ in range(4):
        grid, codes = refine(w, hessian, grid, codes, sweeps=1, refit_scales=refit_scales)
        assert codes.dtype == torch.uint8
        assert codes.max() <= 2**bits - 1
        errors.append(error_of(w, hessian, grid, codes))
    # Each step is the exact minimum over what fp16 and the grid hold; what remains is float32 noise in the sums.
    assert all(later <= earlier * (1 + 1e-4) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0] if start == "nearest" else errors[-1] <= errors[0]


def test_several_sweeps_are_one_sweep_several_times(generator):
    w, hessian, grid = problem(generator)
    codes = nearest(w, grid)
    at_once = refine(w, hessian, grid, codes, sweeps=3)
    grid_by_one, codes_by_one = grid, codes
    for _ in range(3):
        grid_by_one, codes_by_one = refine(w, hessian, grid_by_one, codes_by_one, sweeps=1)
    # The slope is kept up to date in one case and recomputed in the other: equal up to float32 noise.
    assert error_of(w, hessian, *at_once) == pytest.approx(error_of(w, hessian, grid_by_one, codes_by_one), rel=0.02)


def test_refining_without_refit_keeps_the_grid(generator):
    w, hessian, grid = problem(generator)
    refined, _ = refine(w, hessian, grid, nearest(w, grid), sweeps=2, refit_scales=False)
    assert torch.equal(refined.scale, grid.scale)
    assert torch.equal(refined.zero, grid.zero)


def test_refitted_scales_are_what_fp16_stores(generator):
    w, hessian, grid = problem(generator)
    refined, _ = refine(w, hessian, grid, nearest(w, grid), sweeps=2)
    assert not torch.equal(refined.scale, grid.scale)
    assert torch.equal(refined.scale, refined.scale.half().float())
    assert torch.equal(refined.zero, grid.zero)


@pytest.mark.parametrize(("rows", "channels"), [(24, 128), (24, 32), (1, 128)])
def test_refining_leaves_its_arguments_as_they_were(rows, channels, generator):
    w, hessian, grid = problem(generator, rows=rows, channels=channels)
    codes = nearest(w, grid)
    before = [t.clone() for t in (w, hessian, grid.scale, grid.zero, codes)]
    refine(w, hessian, grid, codes, sweeps=2)
    assert all(map(torch.equal, before, (w, hessian, grid.scale, grid.zero, codes)))


@pytest.mark.parametrize("kind", SINGULAR)
def test_refining_bears_singular_hessians(kind, generator):
    w, _, grid = problem(generator)
    hessian = SINGULAR[kind](torch.randn(200, 128, generator=generator))
    codes = nearest(w, grid)
    refined, refined_codes = refine(w, hessian, grid, codes, sweeps=2)
    assert refined.scale.isfinite().all()
    assert (refined.scale > 0).all()
    assert error_of(w, hessian, refined, refined_codes) <= error_of(w, hessian, grid, codes)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("weighed", [False, True])
def test_the_searched_range_is_never_worse_than_the_full_one(weighed, bits, symmetric, generator):
    w = torch.randn(16, 128, generator=generator) ** 3
    hessian = correlated_hessian(128, generator) if weighed else None
    shrinks = (1.0, 0.95, 0.9, 0.8, 0.7)
    full = search_range(w, hessian, bits, 32, symmetric)
    searched = search_range(w, hessian, bits, 32, symmetric, shrinks)
    before, after = _cost_by_group(w, full, hessian), _cost_by_group(w, searched, hessian)
    # Shrinking is chosen by the same measure in float32, the test measures in float64.
    assert (after <= before * (1 + 1e-4)).all()
    if bits < 8:
        assert after.sum() < before.sum()


def test_the_searched_range_is_the_best_of_those_tried(generator):
    w, shrinks = torch.randn(16, 128, generator=generator) ** 3, (1.0, 0.85, 0.7)
    hessian = correlated_hessian(128, generator)
    searched = _cost_by_group(w, search_range(w, hessian, 3, 32, False, shrinks), hessian)
    alone = [_cost_by_group(w, search_range(w, hessian, 3, 32, False, (shrink,)), hessian) for shrink in shrinks]
    torch.testing.assert_close(searched, torch.stack(alone).amin(0), rtol=1e-4, atol=0)


def test_the_order_of_the_shrinks_does_not_matter(generator):
    w, hessian = torch.randn(16, 128, generator=generator) ** 3, correlated_hessian(128, generator)
    one, other = (search_range(w, hessian, 3, 32, False, s) for s in ((1.0, 0.85, 0.7), (0.7, 1.0, 0.85)))
    assert torch.equal(one.scale, other.scale)
    assert torch.equal(one.zero, other.zero)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_full_grid_spans_the_group(symmetric, generator):
    w = torch.randn(16, 128, generator=generator)
    grid = search_range(w, None, 4, 32, symmetric)
    low, high = group_range(w, 32)
    ends = (0 - grid.zero) * grid.scale, (15 - grid.zero) * grid.scale
    assert (ends[0] <= low + 0.5 * grid.scale + 1e-2).all()
    assert (ends[1] >= high - 0.5 * grid.scale - 1e-2).all()


def test_scales_are_what_fp16_stores(generator):
    grid = search_range(torch.randn(16, 128, generator=generator), None, 4, 32, False, (1.0, 0.9))
    assert torch.equal(grid.scale, grid.scale.half().float())
    assert torch.equal(stored(grid.scale), grid.scale)


MX = Spec(4, 64, weights="mxfp4")
SHRINKS = (1.0, 0.9)


def mx_problem(generator, rows=24):
    """A weight, a correlated Hessian, and the scales of the specification."""
    w = torch.randn(rows, 128, generator=generator) * 0.3
    return w, correlated_hessian(128, generator), search_grid(w, None, MX)


@ORDERS
def test_gptq_to_floats_compensates_each_column_in_the_others(by_activation, generator):
    w, hessian, grid = mx_problem(generator, rows=8)
    inverse = torch.linalg.inv(
        hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(128).double()
    )
    order = hessian.diagonal().argsort(descending=True) if by_activation else torch.arange(128)
    todo, values = w.double(), torch.tensor(E2M1).double()
    found = torch.zeros_like(w)
    for i in order.tolist():
        scale = grid.scale[:, i // 32].double()
        nearest_value = values[((todo[:, i] / scale)[:, None] - values).abs().argmin(1)]
        todo -= torch.outer(todo[:, i] - nearest_value * scale, inverse[i] / inverse[i, i])
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        found[:, i] = nearest_value * scale
    ours = grid.values(gptq(w, hessian, grid, DAMPING, by_activation))
    assert (ours == found).float().mean() > 0.98  # float32 beside float64: one near a middle moves those after it
    assert proxy_error(w, ours, hessian) == pytest.approx(proxy_error(w, found, hessian), rel=0.02)


@pytest.mark.parametrize("refit_scales", [False, True])
def test_floats_get_better_by_gptq_and_again_by_refining(refit_scales, generator):
    w, hessian, grid = mx_problem(generator)
    codes = gptq(w, hessian, grid, DAMPING, True)
    refined, refined_codes = refine(w, hessian, grid, codes, sweeps=2, refit_scales=refit_scales)
    errors = [
        error_of(w, hessian, *pair) for pair in ((grid, nearest(w, grid)), (grid, codes), (refined, refined_codes))
    ]
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < errors[1]
    assert torch.equal(refined.scale, 2.0 ** refined.scale.log2().round())


def test_powers_of_two_are_searched_by_what_an_error_costs(generator):
    w, hessian, specified = mx_problem(generator)
    assert torch.equal(specified.scale, floor_scale(w.view(24, -1, 32).abs().amax(-1)))
    searched = search_grid(w, hessian, MX, SHRINKS)
    before, after = _cost_by_group(w, specified, hessian), _cost_by_group(w, searched, hessian)
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < 0.95 * before.sum()
    assert ((searched.scale / specified.scale).log2().abs() <= 1).all()


def test_zeros_and_what_is_far_outside_have_scales_that_can_be_stored():
    w = torch.zeros(8, 64)
    w[0, :32], w[1, :32], w[2, 40] = 1e30, 1e-30, float(2**15)
    for shrinks in ((1.0,), SHRINKS):
        grid = search_grid(w, None, MX, shrinks)
        assert grid.scale.amin() == 2.0**-23
        assert grid.scale.amax() == 2.0**13
        assert grid.values(nearest(w, grid))[2, 40] == 2**15


def test_proxy_error_is_the_relative_error_of_the_output(generator):
    x = torch.randn(50, 32, generator=generator, dtype=torch.float64)
    w, other = torch.randn(2, 8, 32, generator=generator, dtype=torch.float64)
    expected = ((x @ (w - other).T).square().sum() / (x @ w.T).square().sum()).item()
    assert proxy_error(w, other, x.T @ x) == pytest.approx(expected)
    assert proxy_error(w, w, x.T @ x) == 0
    assert proxy_error(w, torch.zeros_like(w), x.T @ x) == pytest.approx(1)


def _rows(grid: WholeGrid, i: int) -> WholeGrid:
    return WholeGrid(grid.scale[i : i + 1], grid.zero[i : i + 1], grid.bits)


def _cost_by_group(w, grid, hessian):
    """e H_gg eᵀ of every row and group, one by one in float64: [N, G]."""
    num_groups = grid.scale.shape[1]
    g = w.shape[1] // num_groups
    hessian = torch.eye(w.shape[1]) if hessian is None else hessian
    error = (w - grid.values(nearest(w, grid))).double()
    costs = []
    for group in range(num_groups):
        part = slice(group * g, (group + 1) * g)
        costs.append(((error[:, part] @ hessian.double()[part, part]) * error[:, part]).sum(1))
    return torch.stack(costs, dim=1)
