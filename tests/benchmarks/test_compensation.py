"""`benchmarks/corrections.py`: what is added to rounded linears, in closed form and trained with the block."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from pairquant.models.planning import plan_model
from pairquant.optimize import walk as walking
from pairquant.optimize.walk import Walk
from pairquant.spec.options import QuantConfig
from pairquant.spec.recipe import Recipe, Refit

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from bench_compensation import correction_in
from corrections import KINDS, Compensating, Correction, added_bits, low_rank


@pytest.fixture
def layer():
    """A residual [12, 20], and inputs [300, 20] whose channels differ in size and depend on each other."""
    torch.manual_seed(0)
    inputs = torch.randn(300, 20) @ torch.randn(20, 20) * torch.logspace(-2, 2, 20)
    return torch.randn(12, 20), inputs


@pytest.mark.parametrize("wide", [True, False])
def test_the_closed_form_leaves_the_singular_values_of_what_the_layer_puts_out(layer, wide):
    """Eckart and Young: of X Eᵀ a correction of rank r can take away the r largest singular values, and no more."""
    residual, inputs = layer if wide else (torch.randn(31, 20), layer[1])
    inner, outer = low_rank(residual, inputs.T @ inputs, 5)
    left = inputs.double() @ (residual - outer @ inner).T.double()
    least = torch.linalg.svdvals(inputs.double() @ residual.T.double())[5:].square().sum().sqrt()
    assert least * (1 - 1e-6) <= left.norm() < 1.05 * least, "damping costs a little"


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_begin_as_the_closed_form(layer, kind):
    residual, inputs = layer
    inner, outer = low_rank(residual, inputs.T @ inputs, 4)
    correction = Correction.of(kind, residual, inputs.T @ inputs, len(inputs), 4)
    module = nn.Linear(20, 12)
    before = module(inputs)
    correction.attach(module)
    added = module(inputs) - before
    expected = inputs @ inner.T @ outer.T
    assert (added - expected).norm() < 2e-3 * expected.norm(), "rounded to fp16"
    hidden = inputs @ module.correction_inner.T
    torch.testing.assert_close(hidden.square().mean(0), torch.ones(4), atol=5e-3, rtol=0)


@pytest.mark.parametrize("kind", ["silu", "relu"])
def test_a_network_bends_each_of_its_numbers_by_its_own_factor(layer, kind):
    residual, inputs = layer
    correction = Correction.of(kind, residual, inputs.T @ inputs, len(inputs), 3)
    module = nn.Linear(20, 12)
    correction.attach(module)
    correction.values["bend"] += torch.tensor([0.5, -1.0, 0.0])
    correction.settle(module)
    hidden = inputs @ module.correction_inner.T
    expected = hidden + torch.tensor([0.5, -1.0, 0.0]) * KINDS[kind](hidden)
    found = module(inputs) - nn.functional.linear(inputs, module.weight, module.bias)
    torch.testing.assert_close(found, expected @ module.correction_outer.T, atol=1e-3, rtol=1e-3)


def walked(strategy, monkeypatch, refit):
    """A tiny model quantized to 2 bits with this strategy, and the plan."""
    model = tiny_model()
    tokens = torch.randint(3, 259, (8, 32), generator=torch.Generator().manual_seed(1))
    config = QuantConfig(bits=2, group_size=32, recipe=Recipe(steps=5, refit=refit))
    plan, blocks = plan_model(model, config)
    monkeypatch.setattr(walking, "strategy_for", lambda _: strategy)
    list(Walk(model, blocks, plan, config, torch.device("cpu"), tokens).run())
    return blocks, plan


@pytest.mark.parametrize("kind", KINDS)
def test_training_brings_blocks_nearer_to_the_original(kind, monkeypatch):
    strategy = Compensating(kind, 4, 0.03)
    blocks, plan = walked(strategy, monkeypatch, Refit(epochs=3, batch=4))
    assert all(last < first for first, last in strategy.losses)
    assert len(strategy.error_left) == len(plan.layouts)
    assert all(0 < left < 1 for left in strategy.error_left)
    found = dict(blocks[0].module.named_parameters())
    bends = [parameter for name, parameter in found.items() if name.endswith("correction_bend")]
    assert len(bends) == (7 if KINDS[kind] else 0)
    assert all(bend.abs().min() > 0 for bend in bends), "each number of a network has learned"


def test_without_a_training_the_closed_form_stays(monkeypatch):
    strategy = Compensating("svd", 4, 0.03)
    blocks, plan = walked(strategy, monkeypatch, None)
    assert strategy.losses == []
    assert len(strategy.error_left) == len(plan.layouts)
    found = dict(blocks[1].module.named_parameters())
    assert sum(name.endswith("correction_outer") and parameter.any().item() for name, parameter in found.items()) == 7


def test_added_bits_count_every_stored_number():
    sizes = [(576, 576), (1536, 576)]
    weights = 576 * 576 + 1536 * 576
    assert added_bits("svd", 16, sizes) == 16 * 16 * (2 * 576 + 1536 + 576) / weights
    assert added_bits("silu", 16, sizes) == 16 * 16 * (2 * 576 + 1536 + 576 + 2) / weights


@pytest.mark.parametrize("text", ["gelu:16", "silu", "silu:", "silu:0", "silu:-4"])
def test_a_correction_that_there_is_not_is_refused(text):
    with pytest.raises(SystemExit, match=r"silu:16"):
        correction_in(text)
