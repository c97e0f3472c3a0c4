"""The kernels that fit and round, against the functions of core: on the GPU if there is one, else interpreted."""

import pytest
import torch

pytest.importorskip("triton")

from pairquant.core import grid as quantizer
from pairquant.core import rounding
from pairquant.core.grid import MIN_SCALE
from pairquant.core.mx import e2m1
from pairquant.core.rounding import Solvers
from pairquant.kernels.fit import loops as fit
from pairquant.spec.linear import Spec
from pairquant.support.errors import KernelError

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
TRITON = Solvers(fit.compensate, fit.descend)
#: How far from the middle between two steps a number must be for its code to be certain, in steps.
MARGIN = 1e-5
BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])
SYMMETRIC = pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])


def problem(generator, rows, channels, g, bits, symmetric=False):
    """A weight, the second moments of inputs that share a few directions, and the weight's grid; on DEVICE."""
    w = torch.randn(rows, channels, generator=generator)
    x = torch.randn(4 * channels, 8, generator=generator) @ torch.randn(8, channels, generator=generator) * 2
    x += 0.5 * torch.randn(4 * channels, channels, generator=generator)
    w, hessian = w.to(DEVICE), (x.T @ x).to(DEVICE)
    return w, hessian, rounding.search_range(w, None, bits, g, symmetric)


def certain(exact):
    """Where a number, in steps, is far enough from the middle between two; more so for large ones, as in float32."""
    distance = ((exact - exact.floor()) - 0.5).abs()
    return distance > MARGIN * exact.abs().clamp(min=1)


def assert_rounded(steps, exact, lowest, highest):
    """Each of the steps is the one nearest to the exact number that is allowed."""
    nearest = exact.round().clamp(lowest, highest)
    assert ((steps == nearest) | ~certain(exact)).all()
    assert (steps - exact.clamp(lowest, highest)).abs().max() < 0.501


@SYMMETRIC
@BITS
@pytest.mark.parametrize(("columns", "rows"), [(64, 40), (64, 1), (32, 13), (5, 9), (1, 8)])
def test_compensation(columns, rows, bits, symmetric, generator):
    w, hessian, grid = problem(generator, rows, 64, 32, bits, symmetric)
    factor = rounding.inverse_factor(hessian, 0.01).float()[:columns, :columns]
    scale, lowest = (t[:columns].clone() for t in rounding._per_column(grid, 64))
    todo = w.T[:columns].contiguous()
    steps, errors = fit.compensate(todo, factor, scale, lowest, grid.span)
    assert torch.equal(todo, w.T[:columns])
    # One step may fall to either side and move all that follow: each is checked given those before it, in float64.
    left = todo.double()
    for j in range(columns):
        exact = left[j] / scale[j].double()
        bottom = lowest[j].double()
        assert_rounded(steps[j].double(), exact, bottom, bottom + grid.span)
        error = (left[j] - steps[j].double() * scale[j].double()) / factor[j, j].double()
        torch.testing.assert_close(
            errors[j].double(), error, rtol=1e-4, atol=3e-6 * float(todo.abs().max() / factor[j, j])
        )
        left -= torch.outer(factor[j].double(), error)
    expected = rounding.compensate(todo.clone(), factor, scale, lowest, grid.span)
    assert (steps == expected[0]).double().mean() > (0.95 if bits == 8 else 0.99)


def test_compensation_reads_views_in_any_memory_order(generator):
    w, hessian, grid = problem(generator, 11, 96, 32, 4)
    factor = rounding.inverse_factor(hessian, 0.01).float()
    scale, lowest = rounding._per_column(grid, 96)
    part = slice(32, 96)
    want = fit.compensate(w.T[part].contiguous(), factor[part, part].contiguous(), scale[part], lowest[part], 15)
    transposed = factor.T.contiguous().T[part, part]
    got = fit.compensate(w.T[part], transposed, scale.T.contiguous().T[part], lowest[part], 15)
    assert all(map(torch.equal, got, want))


def test_halves_go_to_even(generator):
    todo = torch.arange(-16.0, 16.0).div(2).to(DEVICE).repeat(3, 1)  # -8, -7.5 … 7.5
    ones = torch.ones_like(todo)
    steps, errors = fit.compensate(todo, torch.eye(3, device=DEVICE), ones, -8 * ones, 15)
    want = todo.round().clamp(-8, 7)
    assert torch.equal(steps, want)
    assert torch.equal(errors, todo - want)


def test_what_is_far_outside_is_clamped():
    todo = torch.tensor([[1e30, -1e30, 3e6, -3e6, 9e9, -9e9, 0.0, 1e-30]], device=DEVICE)
    steps, _ = fit.compensate(todo, *(torch.ones(1, n, device=DEVICE) for n in (1, 8)), torch.ones_like(todo) * -2, 7)
    assert steps.tolist() == [[5, -2, 5, -2, 5, -2, 0, 0]]


def mx_problem(generator, rows, channels):
    """A weight, second moments of its inputs, and its grid of E2M1 floats."""
    w, hessian, _ = problem(generator, rows, channels, 32, 4)
    return w, hessian, rounding.search_grid(w, None, Spec(4, 32, weights="mxfp4"))


@pytest.mark.parametrize(("columns", "rows"), [(64, 40), (32, 13), (5, 9), (1, 8)])
def test_compensation_to_floats(columns, rows, generator):
    w, hessian, grid = mx_problem(generator, rows, 64)
    factor = rounding.inverse_factor(hessian, 0.01).float()[:columns, :columns]
    scale, lowest = (t[:columns] for t in rounding._per_column(grid, 64))
    todo = w.T[:columns].contiguous()
    steps, errors = fit.compensate(todo, factor, scale, lowest, grid.span, True)
    wanted, wanted_errors = rounding.compensate(todo.clone(), factor, scale, lowest, grid.span, True)
    assert torch.equal(e2m1(steps), steps)
    alike = steps == wanted
    assert alike.double().mean() > 0.99
    rows_alike = alike.all(0)
    assert rows_alike.any()
    atol = 3e-6 * float((todo / factor[-1, -1]).abs().max())
    torch.testing.assert_close(errors[:, rows_alike], wanted_errors[:, rows_alike], rtol=1e-4, atol=atol)


def test_floats_halfway_go_to_the_even_code_and_what_is_outside_saturates():
    todo = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 7.0, -1e30, 0.0]], device=DEVICE)
    one = torch.ones(1, 1, device=DEVICE)
    steps, errors = fit.compensate(todo, one, torch.ones_like(todo), torch.full_like(todo, -6), 12, True)
    assert steps.tolist() == [[0, 1, 1, 2, 2, 4, 4, -4, 6, -6, 0]]
    assert torch.equal(errors, todo - steps)


@pytest.mark.parametrize("rows", [1, 13])
def test_descent_to_floats(rows, generator):
    w, hessian, grid = mx_problem(generator, rows, 64)
    part, codes = slice(32, 64), rounding.nearest(w, grid)
    slope = (hessian @ (w - grid.values(codes)).T)[part].contiguous()
    local, curvature, scale = hessian[part, part], hessian.diagonal()[part], grid.scale[:, 1]
    bounds = grid.lowest[:, 1], grid.lowest[:, 1] + grid.span
    start = grid.steps(codes).T[part].contiguous()
    (k, m), (wanted, wanted_m) = ((start.clone(), slope.clone()) for _ in range(2))
    fit.descend(k, m, local, curvature, scale, *bounds, True)
    rounding.descend(wanted, wanted_m, local, curvature, scale, *bounds, True)
    assert torch.equal(e2m1(k), k)
    assert (k == wanted).double().mean() > 0.98
    assert not torch.equal(k, start)


@BITS
@pytest.mark.parametrize(("g", "rows"), [(32, 13), (64, 40), (128, 9), (128, 1)])
def test_descent(g, rows, bits, generator):
    w, hessian, grid = problem(generator, rows, 2 * g, g, bits)
    part = slice(g, 2 * g)
    local, curvature = hessian[part, part], hessian.diagonal()[part]
    scale, lowest = grid.scale[:, 1], -grid.zero[:, 1]
    highest = lowest + 2**bits - 1
    start = (rounding.nearest(w, grid).T[part] - grid.zero[:, 1]).float().T.contiguous().T  # as `refine` has it
    slope = (hessian @ (w - grid.values(rounding.nearest(w, grid))).T)[part].contiguous()
    k, m = start.clone(), slope.clone()
    assert k.stride() == start.stride()
    fit.descend(k, m, local, curvature, scale, lowest, highest)
    left = slope.double()
    for j in range(g):
        exact = start[j].double() + left[j] / (curvature[j].double() * scale.double())
        assert_rounded(k[j].double(), exact, lowest.double(), highest.double())
        left -= torch.outer(local[j].double(), (k[j].double() - start[j].double()) * scale.double())
    assert not torch.equal(k, start)
    torch.testing.assert_close(m.double(), left, rtol=1e-4, atol=1e-5 * float(slope.abs().max()))


@pytest.mark.parametrize("by_activation", [False, True])
@pytest.mark.parametrize(("rows", "channels", "g", "bits"), [(21, 96, 32, 3), (9, 128, 128, 4)])
def test_rounding_as_a_whole(rows, channels, g, bits, by_activation, generator):
    w, hessian, grid = problem(generator, rows, channels, g, bits)
    errors = []
    for solvers in (rounding.SOLVERS, TRITON):
        codes = rounding.gptq(w, hessian, grid, 0.01, by_activation, solvers)
        errors.append([rounding.proxy_error(w, grid.values(codes), hessian)])
        for refit in (False, True):
            refined, refined_codes = rounding.refine(w, hessian, grid, codes, 2, refit, solvers)
            errors[-1].append(rounding.proxy_error(w, refined.values(refined_codes), hessian))
    # A code between two may fall to either side, and those that follow make up for it.
    assert errors[1] == pytest.approx(errors[0], rel=5e-3)


def outlier(w):
    w[:, 3] *= 50
    return w


def tied(w):
    w = w.clamp(-1, 1)
    w[:, [1, 2, 7]], w[:, [4, 9]] = 1.0, -1.0
    return w


WEIGHTS = {
    "both signs": lambda w: w,
    "positive": lambda w: w.abs() + 0.1,
    "negative": lambda w: -w.abs() - 0.1,
    "constant": lambda w: torch.full_like(w, 0.5),
    "constant and negative": lambda w: torch.full_like(w, -3e-2),
    "zeros": torch.zeros_like,
    "outlier": outlier,
    "tied extremes": tied,
    "minute": lambda w: w * 1e-7,
    "halves": lambda w: (w * 8).round() / 2,
}


def weight(kind, rows, channels, generator):
    return WEIGHTS[kind](torch.randn(rows, channels, generator=generator)).to(DEVICE)


def same_values(got, want, w, g, bits, symmetric):
    """Equal, but for weights between two steps."""
    scale, _ = quantizer.affine_parameters(*quantizer.group_range(w, g), bits, symmetric)
    scale = scale.repeat_interleave(g, 1).double()
    equal = (got - want).abs() <= 1e-6 * want.abs()
    return (equal | ~certain(w.double() / scale)).all() and ((got - want).abs() < 1.001 * scale).all()


@SYMMETRIC
@BITS
@pytest.mark.parametrize("kind", WEIGHTS)
def test_fake_quantization_and_its_gradient(kind, bits, symmetric, generator):
    w = weight(kind, 5, 128, generator)
    grad = torch.randn(5, 128, generator=generator).to(DEVICE)
    reference = w.clone().requires_grad_()
    want = quantizer.fake_quantize(reference, bits, 32, symmetric)
    want.backward(grad)
    got = fit.fake_quantize_forward(w, bits, 32, symmetric)
    assert same_values(got, want.detach(), w, 32, bits, symmetric)
    got_grad = fit.fake_quantize_backward(w, grad, bits, 32, symmetric)
    same_codes = (got - want.detach()).abs().view(5, 4, 32).amax(-1) < MIN_SCALE / 2
    scale = reference.grad.abs().amax()
    close = torch.isclose(got_grad, reference.grad, rtol=1e-5, atol=1e-5 * float(scale)).view(5, 4, 32).all(-1)
    assert (close | ~same_codes).all()
    assert same_codes.double().mean() > 0.5


@pytest.mark.parametrize(("rows", "channels", "g"), [(1, 32, 32), (130, 96, 32), (3, 192, 64), (33, 256, 128)])
def test_fake_quantization_of_all_shapes(rows, channels, g, generator):
    w = weight("both signs", rows, channels, generator)
    want = quantizer.fake_quantize(w, 4, g)
    assert same_values(fit.fake_quantize_forward(w, 4, g, False), want, w, g, 4, False)
    transposed = w.T.contiguous().T
    assert same_values(fit.fake_quantize_forward(transposed, 4, g, False), want, w, g, 4, False)


def test_the_function_is_differentiable(generator, monkeypatch):
    """Autograd reaches the kernels through `fake_quantize`, whatever the gradient's memory order."""
    monkeypatch.setattr(fit, "_by_triton", lambda device: True)
    w, x = weight("both signs", 6, 64, generator), torch.randn(6, 3, generator=generator).to(DEVICE)
    grads = []
    for function in (fit.fake_quantize, quantizer.fake_quantize):
        leaf = w.clone().requires_grad_()
        (function(leaf, 4, 32, True).T @ x).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-4)


def test_not_a_number_is_not_hidden():
    w = torch.ones(1, 32, device=DEVICE)
    w[0, 5] = float("nan")
    assert fit.fake_quantize_forward(w, 4, 32, False).isnan().any()


def test_core_serves_the_cpu(generator):
    assert fit.solvers(torch.device("cpu")) is rounding.SOLVERS
    w = torch.randn(4, 64, generator=generator, dtype=torch.float64)
    assert torch.equal(fit.fake_quantize(w, 4, 32), quantizer.fake_quantize(w, 4, 32))


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_triton_serves_the_gpu(generator):
    assert fit.solvers(DEVICE) == TRITON
    w = torch.randn(4, 64, device=DEVICE, requires_grad=True)
    assert type(fit.fake_quantize(w, 4, 32).grad_fn) is not type(quantizer.fake_quantize(w, 4, 32).grad_fn)


def test_refusals(generator):
    w = torch.randn(4, 64, generator=generator).to(DEVICE)
    with pytest.raises(KernelError, match="float64, allowed: float32"):
        fit.compensate(w.double(), w[:, :4].double(), w.double(), w.double(), 15)
    with pytest.raises(KernelError, match="group size is 48, allowed: 32, 64, 128"):
        fit.fake_quantize_forward(w, 4, 48, False)
    with pytest.raises(KernelError, match=r"pass m.contiguous\(\)"):
        fit.descend(w, w.T, w, w[0], w[0], w[0], w[0])
