"""The output embedding: rounded like any linear, then trained on what it is for, the probabilities of the next token.

With X the states that the quantized blocks hand over and X₀ those of the original model, both of which no longer change, the
training minimises over the tokens of the text the mean of

    KL(softmax(f(W x₀)) ‖ softmax(f(Ŵ x))),

where f is what the model does to its logits (Gemma 2 caps them). Its gradient by the logits y = Ŵ x is p̂ - p where f changes
nothing. The transform is final, so that all of this happens in the rotated basis: Ŵ = k · s there, and what is trained is
the scale s of each group and, between the whole steps, the place that is rounded to k (straight-through).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.grid import MIN_SCALE
from ..core.grids import WholeGrid, grid_of, stored
from ..core.linear import assemble, transform_of
from ..core.packing import unpack
from ..core.rotation import rotate_dense
from ..models.sites import Site
from ..spec.linear import PackedLinear
from ..spec.recipe import HeadTraining
from .descent import Descent
from .ranks import Ranks
from .search import fast_products
from .strategies import BlockWork, Rounding

#: Logits held at a time, as numbers: 64 MiB in float32; some eight tensors of this size are alive at once.
CHUNK_NUMBERS = 2**24
#: One of so many windows is not trained on: these tell whether the training helped.
HELD_OUT = 8


@dataclass(frozen=True)
class HeadText:
    """What the output embedding reads: of the quantized model, and of the original where the recipe compares the two.

    states, originals: [windows, T, C], this rank's share, on any device; finish: opens a function from the logits of the
    output embedding, [n, vocabulary], to those of the model.
    """

    states: Tensor
    originals: Tensor
    finish: Callable[[], AbstractContextManager[Callable[[Tensor], Tensor]]]


class HeadStrategy(Rounding):
    """`Rounding`, then the training of the recipe, if there is one."""

    def __init__(self, text: Callable[[], HeadText], notice: Callable[[str], None]):
        """text: makes what is trained on, called only where something is trained; notice: is told what that brought."""
        self.text, self.notice = text, notice

    def quantize(self, work: BlockWork) -> None:
        packed, how = self.rounded(work), work.config.recipe.head
        for path, linear in packed.items() if how is not None and how.steps else ():
            fit = HeadFit(self.text(), work.block.sites[path], how or HeadTraining(), work.ranks, work.device)
            packed[path], before, after = fit.run(linear, work.config.seed)
            self.notice(
                f"{path} was trained on the output of the original model: divergence {before:.4f} before, {after:.4f} after, "
                f"on windows held out{'' if after < before else '. It is left as it was'}"
            )
        work.settle(packed, trained=False)


class TrainedHead:
    """A quantized output embedding in its rotated basis. places: float32 [N, G, g], log_scale: [N, G], the change of log s."""

    def __init__(self, packed: PackedLinear, how: HeadTraining):
        grid, bits = grid_of(packed), packed.layout.bits
        assert isinstance(grid, WholeGrid), "embeddings are stored as whole numbers"
        self.start, self.grid, self.transform = packed, grid, transform_of(packed)
        self.places = grid.steps(unpack(packed["qweight"], bits).T.contiguous()).view(*grid.scale.shape, -1)
        self.log_scale = torch.zeros_like(grid.scale)
        self.lowest = grid.lowest[..., None]
        self.trained = [(self.log_scale, how.scale_rate)]
        self.trained += [(self.places, how.code_rate)] if how.code_rate else []

    @property
    def scale(self) -> Tensor:
        """The scales as they are stored, [N, G]."""
        return stored((self.grid.scale * self.log_scale.exp()).clamp(min=MIN_SCALE))

    def steps(self) -> Tensor:
        """Return k of every weight, [N, G, g]."""
        return self.places.round().clamp_(self.lowest, self.lowest + self.grid.span)

    def weight(self) -> Tensor:
        """Return k s, [N, C]."""
        return self.steps().mul_(self.scale[..., None]).flatten(1)

    def logits(self, states: Tensor, weight: Tensor) -> Tensor:
        """states: in the rotated basis, [n, C] → [n, N]."""
        bias = self.start.bias
        return F.linear(states, weight, None if bias is None else bias.float())

    def turned(self, states: Tensor) -> Tensor:
        """Return states [n, C] in the rotated basis, float32."""
        return rotate_dense(states.float() * self.transform.inverse_scales, self.transform.matrix)

    def gather(self, slope: Tensor) -> None:
        """Set the gradients of what is trained from that of `weight`, [N, C], which is overwritten.

        A place outside the grid has none that leads farther out: `keep_within` puts it back after each step.
        """
        slope = slope.view(self.places.shape)
        self.log_scale.grad = (slope * self.steps()).sum(-1).mul_(self.scale)
        self.places.grad = slope.mul_(self.scale[..., None])

    def keep_within(self) -> None:
        """Put places that left the grid on its ends."""
        self.places.clamp_(self.lowest, self.lowest + self.grid.span)

    def packed(self) -> PackedLinear:
        """Return it as it is stored."""
        codes = self.grid.codes_of(self.steps(), self.lowest).flatten(1)
        bias = self.start.bias
        return assemble(self.start.layout, self.transform, codes, replace(self.grid, scale=self.scale), bias)


class HeadFit:
    """The training of one output embedding."""

    def __init__(self, text: HeadText, site: Site, how: HeadTraining, ranks: Ranks, device: torch.device):
        self.text, self.how, self.ranks, self.device = text, how, ranks, device
        self.weight = site.weight.float()
        self.bias = None if site.bias is None else site.bias.float()

    def run(self, packed: PackedLinear, seed: int) -> tuple[PackedLinear, float, float]:
        """Return the trained one and the mean divergence on windows held out, before and after.

        If that is not lower, the one that was given is returned. seed: of the order of the tokens.
        """
        head = TrainedHead(packed.to(self.device), self.how)
        train, judge = _parted(len(self.text.states))
        with self.text.finish() as self.finish, fast_products(self.device):
            before = self._divergence(head, judge)
            self._descend(head, train, torch.Generator().manual_seed(seed))
            after = self._divergence(head, judge)
        return head.packed() if after < before else packed, before, after

    def _descend(self, head: TrainedHead, windows: Tensor, generator: torch.Generator) -> None:
        """Train on the tokens of some windows, int64 [n]."""
        descent = Descent(head.trained, self.how.training, self.how.steps)
        per_step = max(1, self.how.batch // self.ranks.size)
        units: list[Tensor] = []
        for tokens in self._drawn(self._tokens(windows), per_step, generator):
            slope = torch.zeros_like(self.weight)
            self._divergences(head, tokens, slope)
            head.gather(slope.div_(len(tokens)))
            self.ranks.average(descent.gradients)
            units = units or [gradient.square().mean().sqrt().clamp(min=1e-30) for gradient in descent.gradients]
            for gradient, unit in zip(descent.gradients, units, strict=True):
                gradient.div_(unit)
            descent.step()
            head.keep_within()
        descent.end(descent.values())

    def _drawn(self, places: Tensor, count: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield `count` of the places, int64 [n], for each step: all in a random order, again and again."""
        waiting = places[:0]
        for _ in range(self.how.steps):
            while len(waiting) < count:
                waiting = torch.cat([waiting, places[torch.randperm(len(places), generator=generator)]])
            yield waiting[:count]
            waiting = waiting[count:]

    def _tokens(self, windows: Tensor) -> Tensor:
        """Return the places in the whole text of the tokens of some windows, int64."""
        length = self.text.states.shape[1]
        return (windows[:, None] * length + torch.arange(length)).flatten()

    def _divergence(self, head: TrainedHead, windows: Tensor) -> float:
        """Return the mean over the tokens of some windows, of all ranks."""
        tokens = self._tokens(windows)
        return self.ranks.mean(self._divergences(head, tokens) / len(tokens), self.device)

    def _divergences(self, head: TrainedHead, tokens: Tensor, slope: Tensor | None = None) -> float:
        """Return the sum over tokens at these places, int64 [n]; slope: add the gradient by the weight, [N, C], to this."""
        weight, total = head.weight(), torch.zeros((), dtype=torch.float64, device=self.device)
        states, originals = (s.flatten(0, 1) for s in (self.text.states, self.text.originals))
        for some in tokens.split(max(1, CHUNK_NUMBERS // len(weight))):
            x, x0 = (s[some.to(s.device)].to(self.device, torch.float32) for s in (states, originals))
            wanted = self.finish(F.linear(x0, self.weight, self.bias)).log_softmax(-1)
            x = head.turned(x)
            with torch.enable_grad():
                logits = head.logits(x, weight).requires_grad_(slope is not None)
                found = self.finish(logits).log_softmax(-1)
                divergence = F.kl_div(found, wanted, reduction="sum", log_target=True)
            total += divergence.detach()
            if slope is not None:
                (of_logits,) = torch.autograd.grad(divergence, logits)
                slope.addmm_(of_logits.T, x)
        return total.item()


def _parted(windows: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of the windows to train on and to judge by, int64: the same for a text of a single window."""
    numbers = torch.arange(windows)
    held = numbers % HELD_OUT == 0
    return (numbers[~held], numbers[held]) if windows > 1 else (numbers, numbers)
