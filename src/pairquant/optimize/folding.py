"""Learn the transforms that are folded into a model: jointly over all blocks, on the quadratic proxy of `search`.

One pass of the calibration text through the blocks sums the second moments of what norms hand to their readers and of what the
second layer of each pair reads. Pairs are fitted there and then. For the norms, weights and moments of all blocks are kept, in
the host's memory where the device has too little; then the one rotation R of the stream and the scales S of each norm are
trained together on

    Σ over norms  tr(E H Eᵀ) / tr(W H Wᵀ),   E = W - Q(W R S) S⁻¹ Rᵀ,

Q rounding to nearest (straight-through), W the rows of a norm's readers and H the second moments of its output. R mixes the rows of
what writes to the stream as well; that is left out, as it changes no input and hardly the ranges of the groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from ..core.pairs import PairSelection, magnitude_rank, random_rank, select_pairs
from ..core.rotation import givens_positions, rotation_matrix
from ..models.blocks import Block
from ..models.folding import Foldable, Norm, Pair, Transforms
from ..models.sites import Site
from ..spec.linear import Spec
from ..spec.options import QuantConfig
from ..spec.recipe import Recipe
from .homes import Home
from .moments import Moments
from .search import Problem, loss_and_gradients
from .streams import Places, Streams
from .walk import compute_dtype, seed_of

#: Most rows of the readers of one norm that its transform is fitted on, evenly spaced.
ROWS = 1024
#: The fit of the stream takes so many times the recipe's steps, and its angles learn at so much of the recipe's rate: with fewer
#: steps, or at the full rate, one rotation for all blocks comes out no better than scales alone (docs/decisions.md).
STREAM_STEPS, STREAM_RATE = 3, 0.5
#: Share of the device's free memory that the problems of all norms may take; beyond it they wait in the host's.
SHARE = 0.4


@dataclass(frozen=True)
class Learned:
    """transforms: what was found. before, after: mean relative proxy error of the readers of the stream, as rounded to nearest
    without and with them; None where nothing was fitted."""

    transforms: Transforms
    before: float | None = None
    after: float | None = None


@dataclass
class SharedFit:
    """One rotation for several problems of the same number of channels, and scales for each of them or for all.

    theta: [K, C/2]; log_scales: [problems, C], or [1, C] where the scales are shared. before, after: mean relative error.
    """

    pairs: Tensor
    free: Tensor
    group_size: int
    theta: Tensor
    log_scales: Tensor
    before: float = math.nan
    after: float = math.inf

    def matrices(self) -> Tensor:
        """R, float32 [G, g, g]."""
        return rotation_matrix(self.theta * self.free, self.pairs, self.group_size)

    def scales(self, number: int) -> Tensor:
        """S of a problem, float32 [C]."""
        return self.log_scales[number if len(self.log_scales) > 1 else 0].exp()


@torch.no_grad()
def fit_shared(
    problems: Sequence[Problem],
    spec: Spec,
    recipe: Recipe,
    seed: int,
    *,
    device: torch.device,
    method: str = "random",
    one_scale: bool = False,
    angle_rate: float = 1.0,
    starts: Sequence[Tensor] | None = None,
    told: Callable[[int], None] = lambda step: None,
) -> SharedFit:
    """Fit one rotation, of K = `spec.rotations`, and scales to problems that all have C channels.

    problems: weight [N, C] and hessian [C, C], floating, on any device: they are moved to `device` one at a time. one_scale: the
    problems share their scales. angle_rate: the learning rate of the angles, as a multiple of the recipe's. starts: the scales
    that stand for the model as it is, a [C] for each problem, if these are not 1: the fit begins with the better of both.
    told: called after each step.
    """
    search = _Search(problems, spec, recipe, seed, device, method, one_scale)
    search.optimizer.param_groups[0]["factor"] = angle_rate
    losses = search.measure(slopes=False)
    search.fit.before = float(losses.mean())
    if starts is not None and recipe.channel_scales:
        search.begin(losses, starts)
    for step in range(recipe.steps):
        search.step(step)
        told(step)
    search.keep(float(search.measure(slopes=False).mean()))
    return search.best


class _Search:
    """AdamW on the sum of the problems' losses, as `search` does it for each problem alone."""

    def __init__(
        self,
        problems: Sequence[Problem],
        spec: Spec,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        method: str,
        one: bool,
    ):
        self.problems, self.spec, self.recipe, self.device = problems, spec, recipe, device
        channels = problems[0].channels
        selection = _selected(problems, spec, seed, method, device)
        self.theta = torch.zeros(selection.free.shape, device=device, requires_grad=True)
        self.log_scales = torch.zeros(1 if one else len(problems), channels, device=device, requires_grad=True)
        self.fit = SharedFit(selection.pairs, selection.free, spec.group_size, self.theta, self.log_scales)
        self.best = replace(self.fit, theta=self.theta.detach().clone(), log_scales=self.log_scales.detach().clone())
        self.positions = givens_positions(selection.pairs, spec.group_size)
        self.norms: list[Tensor] = []
        trained = [self.theta, self.log_scales] if recipe.channel_scales else [self.theta]
        groups = [{"params": [each], "factor": 1.0} for each in trained]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)

    def measure(self, slopes: bool) -> Tensor:
        """Relative error of each problem [P]; slopes: also the gradients of their sum."""
        g = self.spec.group_size
        with torch.enable_grad():
            scales = self.log_scales.exp()
            matrices = rotation_matrix(self.theta * self.fit.free, self.fit.pairs, g, self.positions)
        leaf_scales, leaf_matrices = scales.detach().requires_grad_(), matrices.detach().clone().requires_grad_()
        losses = []
        for number, held in enumerate(self.problems):
            problem = replace(
                held, weight=held.weight.to(self.device).float(), hessian=held.hessian.to(self.device).float()
            )
            if len(self.norms) <= number:
                self.norms.append((problem.weighted(problem.weight) * problem.weight).sum().clamp(min=1e-30))
            with torch.enable_grad():
                a = leaf_scales[number if len(leaf_scales) > 1 else 0].view(-1, g)
                into, out_of = leaf_matrices * a[:, None, :], leaf_matrices.mT / a[:, :, None]
            loss, grad_into, grad_out_of = loss_and_gradients(problem, into.detach(), out_of.detach(), slopes)
            losses.append(loss / self.norms[number])
            if grad_into is not None and grad_out_of is not None:
                norm = self.norms[number]
                torch.autograd.backward((into, out_of), (grad_into / norm, grad_out_of / norm))
        if slopes:
            given = [
                (whole, leaf.grad)
                for whole, leaf in ((scales, leaf_scales), (matrices, leaf_matrices))
                if whole.requires_grad
            ]
            torch.autograd.backward([whole for whole, _ in given], [grad for _, grad in given])
        return torch.stack(losses)

    def begin(self, losses: Tensor, starts: Sequence[Tensor]) -> None:
        """Begin from other scales, those of the model as it is, where the loss is lower with them."""
        self.log_scales.copy_(torch.stack([start.to(self.device).log() for start in starts]))
        own = self.measure(slopes=False)
        self.fit.before = float(own.mean())
        self.log_scales.mul_((own < losses)[:, None])

    def step(self, step: int) -> None:
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.recipe.steps))
        rate = self.recipe.learning_rate * (self.recipe.final_rate + (1 - self.recipe.final_rate) * cosine)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        self.keep(float(self.measure(slopes=True).mean()))
        self.optimizer.step()

    def keep(self, error: float) -> None:
        """Remember the parameters if they are the best so far."""
        if error < self.best.after:
            self.best.theta.copy_(self.theta)
            self.best.log_scales.copy_(self.log_scales)
            self.best.after = error
        self.best.before = self.fit.before


def _selected(problems: Sequence[Problem], spec: Spec, seed: int, method: str, device: torch.device) -> PairSelection:
    """Return the pairs that rotate together, chosen as `search.select_for` does, for all problems at once."""
    channels, g = problems[0].channels, spec.group_size
    if method == "magnitude":
        sizes = [problem.weight.float().abs().mean(0).to(device) for problem in problems]
        rank = magnitude_rank(torch.stack([size / size.mean().clamp(min=1e-30) for size in sizes]).sum(0), g)
    else:
        rank = random_rank(channels // g, g, torch.Generator().manual_seed(seed), device)
    return select_pairs(rank, spec.rotations)


@dataclass
class Learning:
    """Learns the transforms of a model whose blocks are at `home`, weights outside them in the model.

    found: what each block allows; rotate: whether the stream is rotated; tokens: int64 [windows, T].
    """

    model: nn.Module
    blocks: list[Block]
    found: Sequence[Foldable]
    rotate: bool
    config: QuantConfig
    device: torch.device
    home: Home
    notice: Callable[[str], None] = lambda text: None
    block_done: Callable[[int], None] = lambda index: None
    step_done: Callable[[int], None] = lambda step: None
    problems: list[Problem] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    starts: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def run(self, tokens: Tensor) -> Learned:
        """Return the transforms found; scales and rotations that nothing is fitted on are left out."""
        transforms = Transforms()
        dtype = compute_dtype(self.blocks, self.config, self.device)
        streams = Streams.start(
            self.model, self.blocks, tokens, False, Places(self.device, self.device, dtype), self.notice
        )
        for index, block in enumerate(self.blocks):
            self.home.enter(block, self.device, dtype)
            if index + 1 < len(self.blocks):
                self.home.expect(self.blocks[index + 1], self.device)
            try:
                self._block(index, block, streams, transforms)
            finally:
                self.home.leave(block)
            self.block_done(index)
        if not self.problems:
            return Learned(transforms)
        return self._stream(transforms)

    def _block(self, index: int, block: Block, streams: Streams, transforms: Transforms) -> None:
        """Collect what the norms' transforms are fitted on, fit those of pairs, and pass on to the next block."""
        found = self.found[index]
        starts = {norm.place: 1 / norm.weight.abs().clamp(min=1e-3) for norm in found.norms}
        for norm in found.norms if self.rotate else ():
            norm.absorb()
        probes = {norm.place: min(norm.readers, key=lambda m: m.weight.dim()) for norm in found.norms}
        probes |= {pair.name: pair.columns for pair in found.pairs}
        watched = replace(block, sites=cast(dict[str, Site], probes))
        moments = _by_reader(streams.observe(watched, index).checked(probes)[0])
        quantized = {site.module for site in block.sites.values()}
        for norm in found.norms:
            rows = [m.weight.flatten(0, -2) for m in norm.readers if m.module in quantized]
            if rows and norm.place in moments:
                self._keep(norm, rows, moments[norm.place])
                self.starts.append(starts[norm.place])
        for pair in found.pairs:
            if pair.name in moments and pair.columns.module in quantized:
                fitted = self._pair(pair, moments[pair.name].hessian)
                if fitted is not None:
                    transforms.pairs[pair.name] = fitted
        streams.advance(block, index)

    def _keep(self, norm: Norm, rows: list[Tensor], moments: Moments) -> None:
        step = -(-sum(map(len, rows)) // ROWS)
        weight, hessian = torch.cat([each[::step] for each in rows]), moments.hessian
        store = self._store(weight.shape[1])
        narrow = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.problems.append(
            Problem(weight.to(store, narrow), (hessian / max(1, moments.tokens)).to(store, narrow), 0, self._spec())
        )
        self.norms.append(norm)

    def _store(self, width: int) -> torch.device:
        """Return where the problems of all norms are kept."""
        if self.device.type != "cuda":
            return self.device
        needed = 2 * sum(len(found.norms) for found in self.found) * (ROWS + width) * width
        free = torch.cuda.mem_get_info(self.device)[0] + 2 * sum(
            p.weight.numel() + p.hessian.numel() for p in self.problems
        )
        return self.device if needed < SHARE * free else torch.device("cpu")

    def _spec(self, **changes: int) -> Spec:
        return replace(self.config.spec, **changes)  # type: ignore[arg-type]  # whole numbers

    def _stream(self, transforms: Transforms) -> Learned:
        """Fit R and the scales of all norms, or the scales alone."""
        spec = self._spec() if self.rotate else self._spec(rotations=0)
        recipe = replace(self.config.recipe, steps=STREAM_STEPS * self.config.recipe.steps)
        fit = fit_shared(
            self.problems, spec, recipe, self.config.seed, angle_rate=STREAM_RATE, device=self.device,
            method=self.config.pair_selection, starts=self.starts if self.rotate else None, told=self.step_done,
        )  # fmt: skip
        transforms.stream = fit.matrices() if self.rotate else None
        transforms.norms = {norm.place: fit.scales(i) for i, norm in enumerate(self.norms)}
        return Learned(transforms, fit.before, fit.after)

    def _pair(self, pair: Pair, hessian: Tensor) -> tuple[Tensor | None, Tensor] | None:
        """Return R (or None) and S of a pair; None where its channels are no multiple of the group size.

        Heads that share their values are problems of their own: what they have in common is left out.
        """
        g = self.config.spec.group_size
        group = math.gcd(g, pair.head) if pair.rotates and pair.head else g
        rotations = self.config.spec.rotations if pair.rotates else 0
        if pair.size % group:
            return None
        spec = self._spec(group_size=group, rotations=rotations)
        weight, head = pair.columns.weight.float(), pair.head or pair.size
        places = torch.arange(weight.shape[-1], device=weight.device).view(-1, pair.repeats, head)
        shared = [places[:, i].flatten() for i in range(pair.repeats)]
        problems = [Problem(weight[:, own].contiguous(), hessian[own][:, own].contiguous(), 0, spec) for own in shared]
        seed = seed_of(self.config.seed, pair.name)
        fit = fit_shared(
            problems,
            spec,
            self.config.recipe,
            seed,
            device=self.device,
            method=self.config.pair_selection,
            one_scale=True,
        )
        return (fit.matrices() if rotations else None), fit.scales(0)


def _by_reader(moments: Sequence[Moments]) -> Mapping[str, Moments]:
    return {name: each for each in moments for name in each.readers}
