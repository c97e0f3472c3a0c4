"""The output embedding's training: gradients, what it lowers on text that it never saw, and what it leaves as it was."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model

from pairquant.core.linear import decode
from pairquant.core.rounding import proxy_terms, ratio
from pairquant.evaluation.quality import measure
from pairquant.models.planning import plan_model
from pairquant.models.sites import site_of
from pairquant.optimize.descent import Descent
from pairquant.optimize.drift import MAX_DRIFT, drift_matrix, drift_targets
from pairquant.optimize.head import Correction, HeadFit, HeadText
from pairquant.optimize.moments import Moments
from pairquant.optimize.ranks import ALONE
from pairquant.optimize.strategies import Rounding
from pairquant.optimize.walk import Walk
from pairquant.spec.options import QuantConfig
from pairquant.spec.recipe import HeadTraining, Recipe

CPU = torch.device("cpu")
UNTRAINED = HeadTraining(steps=0)
ROWS, CHANNELS, WINDOWS, LENGTH = 80, 24, 9, 40


def capped(logits):
    return torch.tanh(logits / 8) * 8


class Scene:
    """A head with peaked predictions that reads states a linear map away from the original's; not quantized."""

    def __init__(self, bias=False):
        generator = torch.Generator().manual_seed(5)
        module = torch.nn.Linear(CHANNELS, ROWS, bias=bias).requires_grad_(False)
        module.weight.normal_(0, 0.5, generator=generator)
        if bias:
            module.bias.normal_(0, 1, generator=generator)
        self.site = site_of("lm_head", module)
        self.originals = torch.randn(WINDOWS, LENGTH, CHANNELS, generator=generator)
        drift = torch.eye(CHANNELS) + 0.05 * torch.randn(CHANNELS, CHANNELS, generator=generator)
        self.states = self.originals @ drift
        self.states[..., 3] *= 20  # an outlier, as real models have
        module.weight[:, 3] /= 20
        self.originals[..., 3] *= 20

    def text(self):
        return HeadText(self.states, self.originals, lambda: nullcontext(capped))

    def correction(self, how):
        x = self.states.flatten(0, 1)
        weight, bias = self.site.weight, self.site.bias
        return Correction(torch.zeros(CHANNELS, CHANNELS), x.square().mean(0).sqrt(), weight, bias, how)

    def divergence(self, windows, matrix):
        """Of the probabilities of the next token, by the definition."""
        x, x0 = (states[windows].flatten(0, 1) for states in (self.states, self.originals))
        weight, bias = self.site.weight, self.site.bias
        wanted = capped(F.linear(x0, weight, bias)).softmax(-1)
        found = capped(F.linear(x, weight + weight @ matrix, bias)).softmax(-1)
        return (wanted * (wanted / found).log()).sum(-1).mean()


@pytest.mark.parametrize("bias", [False, True])
def test_a_correction_lowers_the_divergence_on_windows_that_it_never_saw(bias):
    scene, how = Scene(bias), HeadTraining(steps=150, batch=100)
    correction = scene.correction(how)
    before, after = HeadFit(scene.text(), scene.site, how, ALONE, CPU).run(correction, seed=1)
    held_out = [0, 8]
    assert before == pytest.approx(scene.divergence(held_out, torch.zeros(CHANNELS, CHANNELS)).item(), rel=1e-3)
    assert after == pytest.approx(scene.divergence(held_out, correction.matrix()).item(), rel=1e-3)
    assert after < 0.3 * before


def test_its_gradient_is_that_of_the_divergence_however_the_tokens_are_cut(monkeypatch):
    scene, how = Scene(bias=True), HeadTraining()
    tokens = torch.arange(LENGTH)
    correction = scene.correction(how)
    correction.change.requires_grad_()
    monkeypatch.setattr("pairquant.optimize.head.CHUNK_NUMBERS", 7 * ROWS)
    fit = HeadFit(scene.text(), scene.site, how, ALONE, CPU)
    with correction.logits() as logits:
        for divergence in fit._divergences(logits, tokens, capped):
            divergence.backward()
    change = correction.change.detach().clone().requires_grad_()
    (scene.divergence([0], change * correction.units) * LENGTH).backward()
    torch.testing.assert_close(correction.change.grad, change.grad, rtol=1e-3, atol=1e-4)


def test_every_step_has_tokens_of_its_own_until_all_were_seen():
    fit = HeadFit(Scene().text(), Scene().site, HeadTraining(steps=5), ALONE, CPU)
    drawn = torch.cat(list(fit._drawn(torch.arange(20), 8, torch.Generator().manual_seed(3))))
    assert len(drawn) == 40
    for part in drawn.split(20):
        assert part.sort().values.tolist() == list(range(20))


@pytest.mark.parametrize("drift", [1e-3, 1.0])
def test_the_matrix_of_a_drift_is_that_of_its_targets(drift):
    scene = Scene()
    x, x0 = scene.states.flatten(0, 1), scene.originals.flatten(0, 1)
    moments, weight = Moments(["a"], x.T @ x, x0.T @ x, len(x)), scene.site.weight
    target = drift_targets({"a": weight}, moments, drift, ALONE)["a"]
    torch.testing.assert_close(weight + weight @ drift_matrix(weight, moments, drift, ALONE), target)
    changed = ratio(proxy_terms(weight, target, moments.hessian))
    assert changed == pytest.approx(MAX_DRIFT, rel=1e-3) if drift == 1 else changed < MAX_DRIFT / 10


def peaked():
    """A model that caps its logits, and whose predictions are less even than those of random weights."""
    model = tiny_model("gemma2")
    model.get_output_embeddings().weight.data *= 120
    return model


def quantized(how, notice=print, **options):
    tokens, held_out = (
        torch.randint(3, 259, (12, 48), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
    )
    model, recipe = peaked(), Recipe(steps=5, head=how)
    config = QuantConfig(**{"group_size": 32, "rotations": 2, "bits": 5, "head_bits": 3, "recipe": recipe, **options})
    plan, blocks = plan_model(model, config)
    results = list(Walk(model, blocks, plan, config, CPU, tokens, notice=notice).run())
    return results[-1], model, measure(model, held_out, peaked()).kl


def test_a_model_ends_nearer_to_the_original_and_says_what_was_gained():
    heard = []
    _, _, without = quantized(UNTRAINED)
    result, model, kl = quantized(HeadTraining(steps=60, batch=256), heard.append)
    assert kl < 0.95 * without
    (line,) = [line for line in heard if "divergence" in line]
    assert "before rounding" in line
    assert "after rounding" in line
    torch.testing.assert_close(model.get_output_embeddings().weight.data, decode(result.packed["lm_head"]))


def test_a_training_that_does_not_help_is_not_used():
    heard = []
    plain, _, _ = quantized(UNTRAINED)
    wild = HeadTraining(steps=2, batch=64, correction_rate=50.0, scale_rate=3.0, transform_rate=3.0)
    result, _, _ = quantized(wild, heard.append)
    assert sum(line.count("which is not used") for line in heard) == 2
    for name, tensor in plain.packed["lm_head"].tensors.items():
        assert torch.equal(result.packed["lm_head"][name], tensor), name


def test_a_training_is_judged_by_what_is_used_without_it(monkeypatch):
    began, used = [], []

    def run(fit, student, seed):
        if isinstance(student, Correction):
            began.append(fit.weight + fit.weight @ student.matrix())
        return 0.0, 1.0  # of no use

    def targets(strategy, work, usual=Rounding.targets):
        found = usual(strategy, work)
        used.extend(target for path, target in found.items() if path == "lm_head")
        return found

    monkeypatch.setattr(HeadFit, "run", run)
    monkeypatch.setattr(Rounding, "targets", targets)
    monkeypatch.setattr("pairquant.optimize.drift.MAX_DRIFT", 1e-6)  # far below what is to be corrected
    quantized(HeadTraining(steps=1))
    weight = peaked().get_output_embeddings().weight.data
    torch.testing.assert_close(began[0] - weight, used[0] - weight, rtol=1e-2, atol=1e-5)
    assert 0 < (used[0] - weight).norm() < 0.01 * weight.norm()


def test_without_the_original_model_s_states_it_learns_from_the_quantized_one_s():
    options = {"recipe": replace(Recipe(steps=5, drift=0.0), head=HeadTraining(steps=30, batch=256))}
    heard = []
    quantized(UNTRAINED, heard.append, **options)
    (line,) = [line for line in heard if "divergence" in line]
    assert "before rounding" not in line


def test_gradients_lie_in_memory_as_what_they_change_does(monkeypatch):
    """AdamW's fused steps on GPUs refuse any others."""
    seen = []

    def step(descent, usual=Descent.step):
        seen.extend(
            (tensor.dtype, tensor.stride()) == (tensor.grad.dtype, tensor.grad.stride()) for tensor in descent.tensors
        )
        usual(descent)

    monkeypatch.setattr(Descent, "step", step)
    quantized(HeadTraining(steps=2, batch=64))
    assert len(seen) == 2 * (1 + 3), "the correction; then group scales, channel scales and angles"
    assert all(seen)
