"""The fit of transforms that several weights share, and what is collected for it."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model

from pairquant.models.blocks import enter, find_blocks
from pairquant.models.foldable import LOOK_TOKENS, Heads, look
from pairquant.optimize.folding import STREAM_STEPS, Learning, fit_shared
from pairquant.optimize.homes import InPlace
from pairquant.optimize.search import Problem
from pairquant.spec.linear import Spec
from pairquant.spec.options import QuantConfig
from pairquant.spec.recipe import PRESETS

CPU = torch.device("cpu")
SPEC = Spec(4, 32, 4)


def problems(count=3, channels=64, rows=48):
    """Weights whose outlying channels are the same in all of them."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        weight, x = torch.randn(rows, channels, generator=generator), torch.randn(200, channels, generator=generator)
        weight[:, ::16] *= 6
        found.append(Problem(weight, x.T @ x, 0, SPEC))
    return found


@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_one_rotation_serves_all_problems(method):
    fit = fit_shared(problems(), SPEC, PRESETS["quick"], 0, device=CPU, method=method)
    assert fit.after < 0.7 * fit.before
    matrices = fit.matrices()
    assert matrices.shape == (2, 32, 32)
    assert torch.allclose(matrices @ matrices.mT, torch.eye(32).expand(2, -1, -1), atol=1e-5)
    assert fit.log_scales.shape == (3, 64)


def test_scales_may_be_shared_and_rotations_absent():
    found = [replace(problem, spec=replace(SPEC, rotations=0)) for problem in problems()]
    fit = fit_shared(found, found[0].spec, PRESETS["quick"], 0, device=CPU, one_scale=True)
    assert fit.after < fit.before
    assert torch.equal(fit.scales(0), fit.scales(2))
    assert torch.equal(fit.matrices(), torch.eye(32).expand(2, -1, -1))


def test_the_fit_begins_with_the_model_as_it_is_where_that_is_better():
    (problem,) = problems(1)
    hidden = torch.ones(64)
    hidden[::16] = 1 / 6
    worse = replace(problem, weight=problem.weight / hidden)
    still = replace(PRESETS["quick"], steps=0)
    given = fit_shared([worse], SPEC, still, 0, device=CPU, starts=[hidden])
    assert given.after == pytest.approx(given.before)
    assert torch.allclose(given.scales(0), hidden)
    better = fit_shared([problem], SPEC, still, 0, device=CPU, starts=[1 / hidden])
    assert better.after < better.before
    assert torch.equal(better.scales(0), torch.ones(64))


def learned(rotate, rotations=2):
    model = tiny_model("llama")
    config = QuantConfig(preset="quick", group_size=32, rotations=rotations)
    blocks, tokens = find_blocks(model), torch.arange(3, 131).view(4, 32)
    calls = enter(model, blocks, tokens[:1, :LOOK_TOKENS], 1).calls
    heads = Heads.of(model.config)
    found = [look(block, call, 128, heads, 32) for block, call in zip(blocks, calls, strict=True)]
    done, steps = [], []
    learning = Learning(
        model, blocks, found, rotate, config, CPU, InPlace(), block_done=done.append, step_done=steps.append
    )
    result = learning.run(tokens)
    assert done == [0, 1]
    assert steps == list(range(25 * STREAM_STEPS))
    return result


def test_a_model_gets_one_rotation_and_scales_for_each_norm_and_pair():
    result = learned(rotate=True)
    transforms = result.transforms
    assert transforms.stream.shape == (4, 32, 32)
    assert len(transforms.norms) == 4
    assert {name.rpartition(".")[2] for name in transforms.pairs} == {"o_proj", "down_proj"}
    matrices, scales = transforms.pairs["model.layers.0.self_attn.o_proj"]
    assert matrices.shape == (2, 32, 32)
    assert scales.shape == (64,)
    assert transforms.pairs["model.layers.0.mlp.down_proj"][0] is None
    assert result.after < result.before


def test_without_a_rotation_of_the_stream_norms_get_scales():
    result = learned(rotate=False)
    assert result.transforms.stream is None
    assert len(result.transforms.norms) == 4
    assert result.after < result.before
