"""The output embedding, fitted to what it is for: the probabilities of the next token.

With h the states that the quantized blocks hand over and h₀ those of the original model, both of which no longer
change, the mean over the tokens of the text of

    KL(softmax(f(W h₀)) ‖ softmax(f(Ŵ h)))

is minimised twice, f being what the model does to its logits (Gemma 2 caps them). Before rounding, over a matrix A with
Ŵ = W (I + A), from the drift correction on: what the blocks lost is corrected by the few numbers that all tokens share.
After rounding, over what is continuous in Ŵ: group scales, channel scales and angles. Each result is kept if it is
better on windows held out than what the training began with, which is used otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.sites import Site
from ..spec.recipe import HeadTraining
from .descent import Descent, leaves_of, pass_on
from .drift import drift_matrix
from .ranks import Ranks
from .search import fast_products
from .stages import RefitStage
from .strategies import BlockWork, Rounding

#: Logits held at a time, as numbers: 64 MiB in float32; some eight tensors of this size are alive at once.
CHUNK_NUMBERS = 2**24
#: One of so many windows is not trained on: these tell whether the training helped.
HELD_OUT = 8

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class HeadText:
    """What the output embedding reads: of the quantized model, and of the original where the recipe compares the two.

    states, originals: [windows, T, C], this rank's share, on any device; finish: opens a function from the logits of the
    output embedding, [n, vocabulary], to those of the model.
    """

    states: Tensor
    originals: Tensor
    finish: Callable[[], AbstractContextManager[Logits]]


class HeadStrategy(Rounding):
    """`Rounding`, with a target and scales that are trained by the recipe's `head`."""

    def __init__(self, text: HeadText, how: HeadTraining, notice: Callable[[str], None]):
        """notice: is told what the training brought."""
        self.text, self.how, self.notice = text, how, notice
        self.told: list[str] = []

    def quantize(self, work: BlockWork) -> None:
        if not work.groups:
            return
        packed = self.rounded(work)
        (path,) = packed
        recipe, refit = work.config.recipe, self.how.refit
        stage = RefitStage(work.block, work.groups, packed, recipe, refit, work.kept_as, work.device)
        better = self._improves(self._fit(work), Rounded(stage, work.block.sites[path]), "after rounding", work)
        self.notice(f"{path}: divergence from the original model on windows held out, {'; '.join(self.told)}")
        work.settle(stage.packed() if better else packed, trained=False)

    def targets(self, work: BlockWork) -> dict[str, Tensor]:
        (path,) = work.paths
        moments = next(m for m in work.moments if path in m.readers)
        if moments.cross is None or not work.config.recipe.drift:
            return super().targets(work)
        rows, fit = work.rows(path).float(), self._fit(work)
        start = drift_matrix(rows, moments, work.config.recipe.drift, work.ranks)
        size = (moments.hessian.diagonal() / max(1, moments.tokens)).sqrt().clamp(min=1e-12)
        correction = Correction(start, size, fit.weight, fit.bias, self.how)
        if not self._improves(fit, correction, "before rounding", work):
            return super().targets(work)
        return {path: rows + rows @ correction.matrix().detach()}

    def _fit(self, work: BlockWork) -> HeadFit:
        (path,) = work.paths
        return HeadFit(self.text, work.block.sites[path], self.how, work.ranks, work.device)

    def _improves(self, fit: HeadFit, student: Student, when: str, work: BlockWork) -> bool:
        """Train; return whether that helped."""
        before, after = fit.run(student, work.config.seed)
        self.told.append(f"{when} {before:.4f}, trained {after:.4f}{'' if after < before else ', which is not used'}")
        return after < before


class Student(Protocol):
    """Something trained in place of the output embedding. trained: float32 leaf tensors, with their learning rates."""

    trained: list[tuple[Tensor, float]]

    def logits(self) -> AbstractContextManager[Logits]:
        """Open the function from states, float32 [n, C], to logits, [n, N].

        Where gradients are enabled they gather until it closes.
        """


class Correction:
    """The weight W (I + A), not rounded. change: A in units of the channels' sizes, which is trained.

    start: A to begin with, float32 [C, C], its rows of the channels of W; size: root mean square of each channel of the
    states, [C]; weight, bias: W, float32 [N, C], and [N].
    """

    def __init__(self, start: Tensor, size: Tensor, weight: Tensor, bias: Tensor | None, how: HeadTraining):
        self.weight, self.bias = weight, bias
        self.units = size[:, None] / size
        self.change = (start / self.units).contiguous()
        self.trained = [(self.change, how.correction_rate / len(size))]

    def matrix(self) -> Tensor:
        """Return A, [C, C]."""
        return self.change * self.units

    @contextmanager
    def logits(self) -> Iterator[Logits]:
        yield lambda x: F.linear(x + F.linear(x, self.matrix()), self.weight, self.bias)


class Rounded:
    """The quantized weight, its codes fixed."""

    def __init__(self, stage: RefitStage, site: Site):
        self.stage, self.site, self.trained = stage, site, stage.trained

    @contextmanager
    def logits(self) -> Iterator[Logits]:
        weights = self.stage.weights()
        leaves = leaves_of(weights)
        weight = self.site.taken(leaves[self.site.parameter])
        yield lambda x: F.linear(x, weight, bias_of(self.site))
        if torch.is_grad_enabled():
            pass_on(weights, leaves)


class HeadFit:
    """Trains what stands for an output embedding."""

    def __init__(self, text: HeadText, site: Site, how: HeadTraining, ranks: Ranks, device: torch.device):
        self.text, self.how, self.ranks, self.device = text, how, ranks, device
        self.weight, self.bias = site.weight.float(), bias_of(site)

    def run(self, student: Student, seed: int) -> tuple[float, float]:
        """Train; return the mean divergence on windows held out, before and after. seed: of the order of the tokens."""
        windows = torch.arange(len(self.text.states))
        held = windows % HELD_OUT == 0
        train, judge = (windows[~held], windows[held]) if len(windows) > 1 else (windows, windows)
        with self.text.finish() as finish, fast_products(self.device):
            before = self._divergence(student, self._tokens(judge), finish)
            self._descend(student, self._tokens(train), finish, torch.Generator().manual_seed(seed))
            return before, self._divergence(student, self._tokens(judge), finish)

    def _descend(self, student: Student, tokens: Tensor, finish: Logits, generator: torch.Generator) -> None:
        """Train on the tokens at these places, int64 [n].

        Gradients are divided by their root mean square in the first step, in which the floor of the recipe is counted.
        """
        descent = Descent(student.trained, self.how.training, self.how.steps)
        units: list[Tensor] = []
        for some in self._drawn(tokens, max(1, self.how.batch // self.ranks.size), generator):
            with torch.enable_grad(), student.logits() as logits:
                for divergence in self._divergences(logits, some, finish):
                    (divergence / len(some)).backward()
            self.ranks.average(descent.gradients)
            units = units or [gradient.square().mean().sqrt().clamp(min=1e-30) for gradient in descent.gradients]
            for gradient, unit in zip(descent.gradients, units, strict=True):
                gradient.div_(unit)
            descent.step()
        descent.end(descent.values())

    def _drawn(self, tokens: Tensor, count: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield `count` of the places, int64 [n], for each step: all in a random order, again and again."""
        waiting = tokens[:0]
        for _ in range(self.how.steps):
            while len(waiting) < count:
                waiting = torch.cat([waiting, tokens[torch.randperm(len(tokens), generator=generator)]])
            yield waiting[:count]
            waiting = waiting[count:]

    def _tokens(self, windows: Tensor) -> Tensor:
        """Return the places in the whole text of the tokens of some windows, int64."""
        length = self.text.states.shape[1]
        return (windows[:, None] * length + torch.arange(length)).flatten()

    def _divergence(self, student: Student, tokens: Tensor, finish: Logits) -> float:
        """Return the mean over tokens of all ranks."""
        with torch.no_grad(), student.logits() as logits:
            total = torch.stack(list(self._divergences(logits, tokens, finish))).double().sum()
        return self.ranks.mean(total.item() / len(tokens), self.device)

    def _divergences(self, logits: Logits, tokens: Tensor, finish: Logits) -> Iterator[Tensor]:
        """Yield sums over some of the tokens at a time, differentiable. tokens: their places, int64 [n]."""
        states, originals = (stream.flatten(0, 1) for stream in (self.text.states, self.text.originals))
        for some in tokens.split(max(1, CHUNK_NUMBERS // len(self.weight))):
            x, x0 = (s[some.to(s.device)].to(self.device, torch.float32) for s in (states, originals))
            with torch.no_grad():
                wanted = finish(F.linear(x0, self.weight, self.bias)).log_softmax(-1)
            found = finish(logits(x)).log_softmax(-1)
            yield F.kl_div(found, wanted, reduction="sum", log_target=True)


def bias_of(site: Site) -> Tensor | None:
    """Return the bias in float32, if there is one."""
    return None if site.bias is None else site.bias.float()
