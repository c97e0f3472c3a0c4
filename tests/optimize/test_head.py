"""The training of the output embedding: its gradients, what it lowers on other text, and what it leaves as it was."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pairquant.core.linear import Transform, decode, encode
from pairquant.core.packing import unpack
from pairquant.optimize.head import HeadFit, HeadText, TrainedHead
from pairquant.optimize.ranks import ALONE
from pairquant.spec.linear import Spec
from pairquant.spec.recipe import HeadTraining, Recipe

CPU = torch.device("cpu")
ROWS, CHANNELS = 64, 96


@contextmanager
def capped():
    yield lambda logits: torch.tanh(logits / 8) * 8


class Scene:
    """A head with peaked predictions, rounded, and what it reads: of the quantized model and of the original one."""

    def __init__(self, bits=3, bias=False, windows=9):
        generator = torch.Generator().manual_seed(5)
        self.weight = torch.randn(ROWS, CHANNELS, generator=generator) * 0.4
        self.bias = torch.randn(ROWS, generator=generator) if bias else None
        mixing = torch.randn(CHANNELS, CHANNELS, generator=generator) / CHANNELS**0.5
        self.originals = torch.randn(windows, 40, CHANNELS, generator=generator) @ mixing
        drift = torch.eye(CHANNELS) + 0.02 * torch.randn(CHANNELS, CHANNELS, generator=generator)
        self.states = self.originals @ drift
        x = self.states.flatten(0, 1)
        layout = Spec(bits, 32, 0).layout(CHANNELS, ROWS, bias=bias)
        transform = Transform.identity(CHANNELS, 32)
        self.packed = encode(self.weight, transform, x.T @ x, layout, Recipe(), self.bias)

    def fit(self, how):
        text, site = HeadText(self.states, self.originals, capped), SimpleNamespace(weight=self.weight, bias=self.bias)
        return HeadFit(text, site, how, ALONE, CPU)

    def trained(self, **how):
        with torch.no_grad():
            return self.fit(HeadTraining(**how)).run(self.packed, seed=1)

    def divergence(self, packed, windows):
        """Of the probabilities of the next token, by the definition."""
        x, x0 = (states[windows].flatten(0, 1) for states in (self.states, self.originals))
        with capped() as finish:
            wanted = finish(F.linear(x0, self.weight, self.bias)).softmax(-1)
            found = finish(F.linear(x, decode(packed), self.bias)).softmax(-1)
        return (wanted * (wanted / found).log()).sum(-1).mean()


@pytest.mark.parametrize("bias", [False, True])
def test_it_lowers_the_divergence_on_windows_it_never_saw_and_says_so(bias):
    scene = Scene(bias=bias)
    packed, before, after = scene.trained(steps=40, batch=128, scale_rate=1e-3, code_rate=0.1)
    held_out = [0, 8]
    assert before == pytest.approx(scene.divergence(scene.packed, held_out).item(), rel=1e-2)
    assert after == pytest.approx(scene.divergence(packed, held_out).item(), rel=1e-2)
    assert after < 0.9 * before
    changed = {name for name, tensor in packed.tensors.items() if not torch.equal(tensor, scene.packed[name])}
    assert changed == {"qweight", "scales"}


def test_codes_stay_where_they_are_not_to_move():
    scene, how = Scene(), HeadTraining(steps=5, batch=128, scale_rate=1e-2, code_rate=0.0)
    head, fit = TrainedHead(scene.packed, how), scene.fit(how)
    with torch.no_grad(), capped() as fit.finish:
        fit._descend(head, torch.arange(9), torch.Generator().manual_seed(0))
        packed = head.packed()
    assert torch.equal(packed["qweight"], scene.packed["qweight"])
    assert not torch.equal(packed["scales"], scene.packed["scales"])


def test_a_training_that_does_not_help_leaves_the_head_as_it_was():
    scene = Scene()
    packed, before, after = scene.trained(steps=5, batch=64, scale_rate=0.3, code_rate=5.0)
    assert after > before
    assert packed is scene.packed


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_divergence(bias):
    scene, how = Scene(bias=bias), HeadTraining()
    head, tokens = TrainedHead(scene.packed, how), torch.arange(70)
    fit = scene.fit(how)
    with torch.no_grad(), capped() as fit.finish:
        slope = torch.zeros(ROWS, CHANNELS)
        fit._divergences(head, tokens, slope)
        head.gather(slope)
    places, log_scale = head.places.clone().requires_grad_(), head.log_scale.clone().requires_grad_()
    rotated = (places * (head.grid.scale * log_scale.exp())[..., None]).flatten(
        1
    )  # as if every place were its own step
    states, originals = (s.flatten(0, 1)[tokens] for s in (scene.states, scene.originals))
    bias = None if scene.bias is None else scene.bias.half().float()
    with capped() as finish:
        wanted = finish(F.linear(originals, scene.weight, scene.bias)).log_softmax(-1)
        found = finish(F.linear(head.turned(states), rotated, bias)).log_softmax(-1)
    F.kl_div(found, wanted, reduction="sum", log_target=True).backward()
    torch.testing.assert_close(head.places.grad, places.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.log_scale.grad, log_scale.grad, rtol=1e-4, atol=1e-5)


def test_places_stay_on_the_grid():
    head = TrainedHead(Scene().packed, HeadTraining())
    head.places += 100.0
    head.keep_within()
    codes = unpack(head.packed()["qweight"], 3)
    assert (codes == 7).all()
