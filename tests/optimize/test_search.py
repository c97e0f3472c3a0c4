"""Fitting transforms on the quadratic proxy."""

from dataclasses import replace

import pytest
import torch
from agreement import distance

from pairquant.core.grid import fake_quantize
from pairquant.core.linear import Transform, decode, encode, rotated_weight
from pairquant.core.rotation import rotate_dense
from pairquant.core.rounding import proxy_error
from pairquant.optimize.search import Problem, fit_transforms, loss_and_gradients, select_for
from pairquant.spec.codes import SUPPORTED_BITS
from pairquant.spec.linear import Spec
from pairquant.spec.options import QuantConfig
from pairquant.spec.recipe import Recipe

N, C = 32, 128
# Spelled out, so that these tests hold whatever the presets become.
ROUNDING = {"rounding": "nearest", "shrinks": (1.0,), "sweeps": 0}
FEW_STEPS = QuantConfig(group_size=64, rotations=4, recipe=Recipe(steps=12, **ROUNDING))
FULL = QuantConfig(group_size=64, rotations=8, recipe=Recipe(steps=80, **ROUNDING))


def draw_problem(generator, seed=0, rows=N, channels=C, config=FEW_STEPS) -> Problem:
    """A weight whose every sixteenth input channel is an outlier, behind inputs of uneven size."""
    weight = torch.randn(rows, channels, generator=generator)
    weight[:, ::16] *= 12
    x = torch.randn(4 * channels, channels, generator=generator) * torch.rand(channels, generator=generator).exp()
    x += torch.randn(4 * channels, 1, generator=generator)
    return Problem(weight, x.T @ x / len(x), seed, config.spec)


def rounding_error(problem: Problem, transform: Transform, config: QuantConfig) -> float:
    """Relative proxy error after storing the weight by this transform."""
    layout = config.spec.layout(*problem.weight.shape[::-1])
    packed = encode(problem.weight, transform, problem.hessian, layout, config.recipe)
    return proxy_error(problem.weight, decode(packed), problem.hessian)


def unrotated(problem: Problem, config: QuantConfig) -> float:
    return rounding_error(problem, Transform.identity(problem.channels, 64, config.rotations), config)


def equal(one: Transform, other: Transform) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("theta", "pairs", "inverse_scales"))


def test_weights_without_rotations_have_scales_or_no_transform_at_all(generator):
    problem = draw_problem(generator)
    problems = [problem, replace(problem, spec=replace(problem.spec, rotations=0))]
    alone = FEW_STEPS
    bare = replace(FEW_STEPS, recipe=replace(FEW_STEPS.recipe, scales_alone=False))
    (rotated, scaled), (same, nothing) = (fit_transforms(problems, config) for config in (alone, bare))
    assert equal(rotated, same)
    assert not (scaled.inverse_scales == 1).all()
    assert (nothing.inverse_scales == 1).all()
    assert nothing.theta.numel() == 0


def test_losses_and_gradients_of_parts_of_the_rows_add_up(generator):
    problem = draw_problem(generator)
    into, out_of = (torch.randn(2, 64, 64, generator=generator) for _ in range(2))
    whole = loss_and_gradients(problem, into, out_of)
    parts = [
        loss_and_gradients(replace(problem, weight=problem.weight[rows]), into, out_of)
        for rows in (slice(0, 8), slice(8, 8), slice(8, N))
    ]
    for value, *shares in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(shares), value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))


@pytest.mark.parametrize("symmetric", [False, True])
def test_loss_and_gradients_equal_those_of_autograd(symmetric, generator):
    config = replace(FULL, symmetric=symmetric)
    problem = draw_problem(generator, config=config)
    into, out_of = (torch.randn(2, 64, 64, generator=generator, requires_grad=True) for _ in range(2))
    rounded = fake_quantize(rotate_dense(problem.weight, into), config.bits, 64, symmetric)
    error = problem.weight - rotate_dense(rounded, out_of)
    expected = ((error @ problem.hessian) * error).sum()
    expected.backward()
    with torch.no_grad():
        loss, grad_into, grad_out_of = loss_and_gradients(problem, into.detach(), out_of.detach())
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(grad_into, into.grad, rtol=1e-3, atol=1e-3 * float(into.grad.abs().max()))
    torch.testing.assert_close(grad_out_of, out_of.grad, rtol=1e-3, atol=1e-3 * float(out_of.grad.abs().max()))


@pytest.mark.parametrize("pair_selection", ["random", "magnitude"])
def test_fitting_lowers_the_error_clearly(pair_selection, generator):
    problem, config = draw_problem(generator), replace(FULL, pair_selection=pair_selection)
    (transform,) = fit_transforms([replace(problem, spec=config.spec)], config)
    assert rounding_error(problem, transform, config) < 0.2 * unrotated(problem, config)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_fitting_lowers_the_error_at_every_width(bits, symmetric, generator):
    problem = draw_problem(generator)
    config = replace(FEW_STEPS, bits=bits, symmetric=symmetric, recipe=replace(FEW_STEPS.recipe, steps=30))
    (transform,) = fit_transforms([replace(problem, spec=config.spec)], config)
    assert rounding_error(problem, transform, config) < 0.7 * unrotated(problem, config)


def test_rotations_help_beyond_channel_scales(generator):
    problem, scales_only = draw_problem(generator), replace(FULL, rotations=0)
    errors = [
        rounding_error(problem, fit_transforms([replace(problem, spec=config.spec)], config)[0], config)
        for config in (FULL, scales_only)
    ]
    assert errors[0] < errors[1] < unrotated(problem, FULL)


def test_more_steps_never_hurt_the_same_start(generator):
    problem = draw_problem(generator)
    no_steps = replace(FULL, recipe=replace(FULL.recipe, steps=0))
    (transform,) = fit_transforms([replace(problem, spec=no_steps.spec)], no_steps)
    assert rounding_error(problem, transform, no_steps) == pytest.approx(unrotated(problem, FULL))
    assert (transform.theta == 0).all()
    assert (transform.inverse_scales == 1).all()


def test_the_best_step_is_kept_when_the_rate_is_absurd(generator):
    problem = draw_problem(generator)
    wild = replace(FEW_STEPS, recipe=replace(FEW_STEPS.recipe, learning_rate=20.0))
    (transform,) = fit_transforms([problem], wild)
    # The start, the identity, is a step too; fp16 storage of scales may cost a little.
    assert rounding_error(problem, transform, wild) <= 1.05 * unrotated(problem, wild)


def test_the_same_seed_gives_the_same_transform(generator):
    problem = draw_problem(generator)
    (one,), (other,) = (fit_transforms([problem], FEW_STEPS) for _ in range(2))
    assert equal(one, other)


def test_another_seed_gives_other_pairs(generator):
    problem = draw_problem(generator)
    one, other = (select_for(problem.weight, seed, FEW_STEPS.spec, "random").pairs for seed in (1, 2))
    assert not torch.equal(one, other)


def test_the_fitted_pairs_are_the_selected_ones(generator):
    problems = [draw_problem(generator, seed) for seed in (3, 4)]
    for problem, transform in zip(problems, fit_transforms(problems, FEW_STEPS), strict=True):
        assert torch.equal(transform.pairs, select_for(problem.weight, problem.seed, FEW_STEPS.spec, "random").pairs)


def test_angles_of_filling_pairs_stay_zero(generator):
    config = replace(FEW_STEPS, group_size=32, rotations=16)
    problem = draw_problem(generator)
    free = select_for(problem.weight, problem.seed, config.spec, "random").free
    (transform,) = fit_transforms([replace(problem, spec=config.spec)], config)
    assert not free.all()
    assert (transform.theta[~free] == 0).all()
    assert (transform.theta[free] != 0).float().mean() > 0.9


def test_transforms_hold_what_fp16_stores(generator):
    (transform,) = fit_transforms([draw_problem(generator)], FEW_STEPS)
    for values in (transform.theta, transform.inverse_scales):
        assert torch.equal(values, values.half().float())
        assert not values.requires_grad
    assert not transform.matrix.requires_grad


def test_problems_fitted_together_are_fitted_as_well_as_alone(generator):
    problems = [draw_problem(generator, seed=5), draw_problem(generator, seed=6, rows=16, channels=192)]
    for problem, together in zip(problems, fit_transforms(problems, FEW_STEPS), strict=True):
        (alone,) = fit_transforms([problem], FEW_STEPS)
        assert torch.equal(together.pairs, alone.pairs)
        # Batched products may round differently, and a code that flips changes the next steps a little.
        errors = [rounding_error(problem, transform, FEW_STEPS) for transform in (together, alone)]
        assert errors[0] == pytest.approx(errors[1], rel=0.1)


def test_problems_of_several_group_sizes_and_rotations_come_back_in_order(generator):
    specs = [Spec(4, 64, 4), Spec(8, 32, 2), Spec(3, 64, 4), Spec(4, 64, 0)]
    problems = [replace(draw_problem(generator, seed), spec=spec) for seed, spec in enumerate(specs)]
    for problem, transform in zip(problems, fit_transforms(problems, FEW_STEPS), strict=True):
        (alone,) = fit_transforms([problem], FEW_STEPS)
        assert transform.matrix.shape[-1] == problem.spec.group_size
        assert len(transform.theta) == problem.spec.rotations
        assert torch.equal(transform.pairs, alone.pairs)


def test_transforms_fitted_together_are_stored_separately(generator):
    problems = [draw_problem(generator, seed) for seed in (1, 2)]
    for problem, transform in zip(problems, fit_transforms(problems, FEW_STEPS), strict=True):
        packed = encode(problem.weight, transform, None, FEW_STEPS.spec.layout(C, N), FEW_STEPS.recipe)
        for tensor in packed.tensors.values():
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_shared_transform_is_that_of_the_stacked_rows(generator):
    first, second = draw_problem(generator), draw_problem(generator, rows=16)
    stacked = Problem(torch.cat((first.weight, second.weight)), first.hessian, 0, FEW_STEPS.spec)
    (shared,) = fit_transforms([stacked], FEW_STEPS)
    whole = encode(stacked.weight, shared, None, FEW_STEPS.spec.layout(C, N + 16), FEW_STEPS.recipe)
    parts = [
        encode(part.weight, shared, None, FEW_STEPS.spec.layout(C, len(part.weight)), FEW_STEPS.recipe)
        for part in (first, second)
    ]
    # Products of another number of rows may round otherwise, and a code between two then falls to the other side.
    assert distance(rotated_weight(whole), torch.cat([rotated_weight(part) for part in parts])) < 0.01
    for name in ("theta", "pairs", "channel_scales"):
        assert all(torch.equal(whole[name], part[name]) for part in parts)
    assert rounding_error(stacked, shared, FEW_STEPS) < unrotated(stacked, FEW_STEPS)


@pytest.mark.parametrize("preset", ["gptq", "rtn"])
def test_without_a_transform_the_identity_comes_back(preset, generator):
    problems = [draw_problem(generator), draw_problem(generator, channels=192)]
    for problem, transform in zip(problems, fit_transforms(problems, QuantConfig(preset, group_size=64)), strict=True):
        assert transform.theta.shape == (0, problem.channels // 2)
        assert (transform.inverse_scales == 1).all()
        assert torch.equal(transform.weight_in(problem.weight), problem.weight)


def test_problems_are_left_as_they_were(generator):
    problem = draw_problem(generator)
    weight, hessian = problem.weight.clone(), problem.hessian.clone()
    fit_transforms([problem], FEW_STEPS)
    assert torch.equal(problem.weight, weight)
    assert torch.equal(problem.hessian, hessian)


@pytest.mark.parametrize("part", ["weight", "hessian"])
def test_all_zeros_give_a_usable_transform(part, generator):
    problem = replace(draw_problem(generator), **{part: torch.zeros(N if part == "weight" else C, C)})
    (transform,) = fit_transforms([problem], FEW_STEPS)
    packed = encode(problem.weight, transform, None, FEW_STEPS.spec.layout(C, N), FEW_STEPS.recipe)
    packed.check_values("linear")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs")
def test_a_replayed_step_finds_what_single_steps_find(generator, monkeypatch):
    problem = draw_problem(generator, rows=256, channels=512)
    problem = replace(problem, weight=problem.weight.cuda(), hessian=problem.hessian.cuda())
    replayed = fit_transforms([replace(problem, spec=FULL.spec)], FULL)[0]
    monkeypatch.setattr("pairquant.optimize.search.GRAPH_WEIGHTS", 0)
    single = fit_transforms([replace(problem, spec=FULL.spec)], FULL)[0]
    assert rounding_error(problem, replayed, FULL) == pytest.approx(rounding_error(problem, single, FULL), rel=0.02)
    torch.testing.assert_close(replayed.theta, single.theta, rtol=0.05, atol=0.05)
