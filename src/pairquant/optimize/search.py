"""Fitting transforms on the quadratic proxy (preset `fast`).

For a linear with weight W and input second moments H = XᵀX, minimise over angles and channel scales

    tr(E H Eᵀ) / tr(W H Wᵀ),   E = W - Ŵ,   Ŵ = (Q((W · diag(a)) R) Rᵀ) · diag(1/a),

by AdamW with a cosine rate, keeping each problem's best step. The tokens never appear: H has seen them all. All
problems of a block are fitted together: their angles lie side by side, and one batched product builds every R.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..core.linear import Transform
from ..core.pairs import PairSelection, magnitude_rank, random_rank, select_pairs
from ..kernels.fit.loops import fake_quantize
from ..kernels.fit.matrices import Matrices
from ..spec.linear import Spec
from ..spec.mx import MX_BLOCK
from ..spec.options import QuantConfig
from .noise import InputNoise
from .ranks import ALONE, Ranks

#: On CUDA a step for up to so many weights is captured after so many ordinary ones, and replayed: launching it anew
#: takes 8 to 11 ms. Larger ones take longer than that to run, and a graph's memory comes on top.
GRAPH_WEIGHTS, GRAPH_WARM_UP = 128_000_000, 3
#: Most rows on which a transform is fitted: the experts of a block have 200,000 together, an output embedding as many.
SHARED_ROWS = 32_768


@dataclass(frozen=True)
class Problem:
    """One transform to find, for a weight that will be stored as `spec`.

    weight: float32 [N, C], the rows of all linears that will share it, or this rank's part of them; hessian: [C, C]; noise:
    what rounding the activations adds to the loss, None where they are not rounded.
    """

    weight: Tensor
    hessian: Tensor
    seed: int
    spec: Spec
    noise: InputNoise | None = None

    @property
    def channels(self) -> int:
        return self.weight.shape[1]

    def weighted(self, error: Tensor) -> Tensor:
        """Return E H, float32 [N, C]: this product takes nearly all of the fitting's time.

        On CUDA its operands are rounded to bfloat16, and their products summed in float32: what is fitted then differs
        by less than two seeds do (docs/decisions.md).
        """
        if not error.is_cuda:
            return error @ self.hessian
        return torch.mm(error.bfloat16(), self.operand, out_dtype=torch.float32)

    @cached_property
    def operand(self) -> Tensor:
        """H as `weighted` multiplies by it on CUDA."""
        return self.hessian.bfloat16()


def loss_and_gradients(
    problem: Problem, into: Tensor, out_of: Tensor, slopes: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """tr(E H Eᵀ) with Ŵ = Q(W · into) · out_of, and its gradients with respect to the two, all [G, g, g] matrices.

    Written out instead of recorded: the gradient 2 E H is the product that the value needs anyway, and nothing of the
    weight's size outlives the call.
    """
    g = into.shape[-1]
    if not len(problem.weight):  # a rank without rows
        zero = torch.zeros_like(into)
        return zero.sum(), zero if slopes else None, zero if slopes else None
    weight = _by_group(problem.weight, g)
    rotated = torch.bmm(weight, into)  # [G, N, g]
    with torch.enable_grad():
        leaf = rotated.requires_grad_(slopes)
        rounded = _fake_rounded(leaf, problem.spec).view_as(leaf)
    error = torch.empty_like(problem.weight)
    torch.sub(weight, torch.bmm(rounded.detach(), out_of), out=_by_group(error, g))
    weighted = problem.weighted(error)
    loss = torch.dot(weighted.view(-1), error.view(-1))
    if not slopes:
        return loss, None, None
    slope = _by_group(weighted.mul_(-2), g)
    grad_out_of = torch.bmm(rounded.detach().mT, slope)
    (grad_rotated,) = torch.autograd.grad(rounded, leaf, torch.bmm(slope, out_of.mT))
    return loss, torch.bmm(weight.mT, grad_rotated), grad_out_of


def _fake_rounded(w_rot: Tensor, spec: Spec) -> Tensor:
    """Round w_rot [N, g] as a transform is fitted on it: to nearest, with the range of each group; differentiable.

    MXFP4 stands in as whole numbers of 4 bits in blocks of its size: its own rounding took more time and memory in the fit,
    and made no difference after GPTQ (docs/decisions.md).
    """
    span = spec.group_size if spec.weights is None else MX_BLOCK
    return fake_quantize(w_rot.view(-1, span), spec.bits, span, spec.symmetric)


def _by_group(w: Tensor, g: int) -> Tensor:
    """[N, C] → [G, N, g], a view."""
    return w.view(w.shape[0], -1, g).transpose(0, 1)


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Allow TF32 on CUDA, for the steps of a fit; rounding itself always uses full float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@torch.no_grad()
def fit_transforms(problems: list[Problem], config: QuantConfig, ranks: Ranks = ALONE) -> list[Transform]:
    """Return the best transform found for each problem, with fp16-rounded values, on the problems' device.

    Several ranks have the same problems, each with rows of its own, and get the same transforms. Problems of one group
    size and number of rotations are searched together.
    """
    found: dict[int, Transform] = {}
    for alike in alike_in_rotation([problem.spec for problem in problems]):
        chosen = [problems[i] for i in alike]
        if not config.recipe.transforms(chosen[0].spec.rotations):
            found |= {
                i: Transform.identity(
                    problems[i].channels, problems[i].spec.group_size, device=problems[i].weight.device
                )
                for i in alike
            }
            continue
        with fast_products(chosen[0].weight.device):
            search = _Search(chosen, config, ranks)
            search.run()
            search.losses = search.evaluate(slopes=False)
            search.optimizer.zero_grad(set_to_none=True)
            search.combine()
            search.keep_best(search.losses)
        found |= dict(zip(alike, search.transforms(), strict=True))
    return [found[i] for i in range(len(problems))]


def alike_in_rotation(specs: Sequence[Spec]) -> list[list[int]]:
    """Return places of the specs with one group size and number of rotations, whose channels can lie side by side."""
    places: dict[tuple[int, int], list[int]] = {}
    for i, spec in enumerate(specs):
        places.setdefault((spec.group_size, spec.rotations), []).append(i)
    return list(places.values())


def sampled_rows(rows: Sequence[Tensor]) -> Tensor:
    """Join weights [N, C] that share a transform; of more than `SHARED_ROWS` rows, evenly spaced ones stand for all.

    A single weight of no more rows is returned as it is.
    """
    step = -(-sum(map(len, rows)) // SHARED_ROWS)
    if len(rows) == 1:
        return rows[0] if step <= 1 else rows[0][::step].contiguous()
    return torch.cat([each[::step] for each in rows])


def select_for(weight: Tensor, seed: int, spec: Spec, method: str, ranks: Ranks = ALONE) -> PairSelection:
    """Return the pairs of the transform of a weight [N, C], by a method of `PAIR_SELECTIONS`, from a seed of its own.

    Several ranks pass rows of their own, and select the same pairs.
    """
    return select_pairs(_pair_rank(weight, seed, spec.group_size, method, ranks), spec.rotations)


def _pair_rank(weight: Tensor, seed: int, g: int, method: str, ranks: Ranks) -> Tensor:
    """Return the order in which pairs are considered, float32 [G, g, g]."""
    if method == "magnitude":
        magnitudes = weight.abs().sum(0)
        ranks.add(magnitudes)
        return magnitude_rank(magnitudes, g)
    return random_rank(weight.shape[1] // g, g, torch.Generator().manual_seed(seed), weight.device)


class _Search:
    """Problems of one group size and number of rotations, their parameters side by side.

    theta: [K, ΣC/2] from zero; log_scale: log a, [ΣC] from zero.
    """

    def __init__(self, problems: list[Problem], config: QuantConfig, ranks: Ranks):
        device = problems[0].weight.device
        self.problems, self.config, self.ranks = problems, config, ranks
        self.group_size, rotations = problems[0].spec.group_size, problems[0].spec.rotations
        self.sizes = [p.channels for p in problems]
        method, g = config.pair_selection, self.group_size
        order = torch.cat([_pair_rank(p.weight, p.seed, g, method, ranks) for p in problems])
        selection = select_pairs(order, rotations)  # of all at once: the time goes into launches
        self.pairs, self.free = selection.pairs, selection.free
        self.matrices = Matrices(self.pairs, self.group_size)
        self.norms = torch.stack([(p.weighted(p.weight) * p.weight).sum() for p in problems])
        ranks.add(self.norms)
        self.norms.clamp_(min=1e-30)
        self.theta = torch.zeros(self.free.shape, device=device, requires_grad=True)
        self.log_scale = torch.zeros(sum(self.sizes), device=device, requires_grad=True)
        self.best_theta, self.best_log_scale = self.theta.detach().clone(), self.log_scale.detach().clone()
        self.losses = torch.zeros(len(problems), device=device)
        self.best_loss = torch.full_like(self.losses, torch.inf)
        sizes = torch.tensor(self.sizes, device=device)
        self.problem_of_channel = torch.arange(len(problems), device=device).repeat_interleave(sizes)
        trained = [self.theta, self.log_scale] if config.recipe.channel_scales else [self.theta]
        self.rate = torch.tensor(config.recipe.learning_rate, device=device)
        self.optimizer = torch.optim.AdamW(
            trained, lr=self.rate, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, capturable=device.type == "cuda"
        )

    def evaluate(self, slopes: bool) -> Tensor:
        """Relative proxy error of each problem [P]; `slopes`: also the gradients of theta and log_scale.

        All of this rank's rows only: see `combine`.
        """
        g = self.group_size
        with torch.enable_grad():
            a = self.log_scale.exp().view(-1, g)
            matrices = self.matrices(self.theta * self.free)
            # With the scale folded into the small matrices, nothing of the weight's size is multiplied by it.
            into, out_of = matrices * a[:, :, None], matrices.mT / a[:, None, :]
        counts = [c // g for c in self.sizes]
        losses, grads_into, grads_out_of = [], [], []
        for problem, norm, forth, back in zip(
            self.problems, self.norms, into.detach().split(counts), out_of.detach().split(counts), strict=True
        ):
            loss, grad_into, grad_out_of = loss_and_gradients(problem, forth, back, slopes)
            if problem.noise is not None:
                added, more_into, more_out_of = problem.noise.loss_and_gradients(forth, back, slopes)
                loss = loss + added
                if (
                    more_into is not None
                    and more_out_of is not None
                    and grad_into is not None
                    and grad_out_of is not None
                ):
                    grad_into = grad_into + more_into
                    grad_out_of = grad_out_of + more_out_of
            losses.append(loss / norm)
            if grad_into is not None and grad_out_of is not None:
                grads_into.append(grad_into / norm)
                grads_out_of.append(grad_out_of / norm)
        if slopes:
            torch.autograd.backward((into, out_of), (torch.cat(grads_into), torch.cat(grads_out_of)))
        return torch.stack(losses)

    def run(self) -> None:
        """Run all steps; on CUDA, where it is faster, by replaying one captured step."""
        steps = range(self.config.recipe.steps)
        small = sum(p.weight.numel() for p in self.problems) <= GRAPH_WEIGHTS
        if self.theta.is_cuda and small and len(steps) > 2 * GRAPH_WARM_UP:
            self._replay(steps)
        else:
            for step in steps:
                self.step(step)

    def _replay(self, steps: range) -> None:
        ahead = torch.cuda.Stream(self.theta.device)
        ahead.wait_stream(torch.cuda.current_stream(self.theta.device))
        with torch.cuda.stream(ahead):
            for step in steps[:GRAPH_WARM_UP]:
                self.step(step)
        torch.cuda.current_stream(self.theta.device).wait_stream(ahead)
        self.optimizer.zero_grad(set_to_none=True)
        graphs = []
        for work in (self.measure, self.update):
            graphs.append(torch.cuda.CUDAGraph())
            # On a stream of this device: the default one is the first device's.
            with torch.cuda.graph(graphs[-1], stream=ahead):
                work()
        for step in steps[GRAPH_WARM_UP:]:
            self.set_rate(step)
            graphs[0].replay()
            self.combine()
            graphs[1].replay()

    def step(self, step: int) -> None:
        self.set_rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        self.measure()
        self.combine()
        self.update()

    def measure(self) -> None:
        self.losses = self.evaluate(slopes=True)

    def combine(self) -> None:
        """Sum losses and gradients over all ranks: between the two graphs, as NCCL's launches are not captured."""
        for tensor in (self.losses, self.theta.grad, self.log_scale.grad):
            if tensor is not None:  # K = 0 has no angles
                self.ranks.add(tensor)

    def update(self) -> None:
        self.keep_best(self.losses)
        self.optimizer.step()

    def set_rate(self, step: int) -> None:
        recipe = self.config.recipe
        cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        self.rate.fill_(recipe.learning_rate * (recipe.final_rate + (1 - recipe.final_rate) * cosine))

    def keep_best(self, losses: Tensor) -> None:
        better = losses < self.best_loss
        by_channel = better[self.problem_of_channel]
        for best, now, where in (
            (self.best_loss, losses, better),
            (self.best_theta, self.theta, by_channel[::2]),
            (self.best_log_scale, self.log_scale, by_channel),
        ):
            best.copy_(torch.where(where, now, best))

    def transforms(self) -> list[Transform]:
        self.ranks.same([self.best_theta, self.best_log_scale])
        theta = (self.best_theta * self.free).split([c // 2 for c in self.sizes], dim=1)
        pairs, inverse_scales = self.pairs.split(self.sizes, dim=1), self.best_log_scale.neg().exp().split(self.sizes)
        return [Transform.build(t, p, s, self.group_size) for t, p, s in zip(theta, pairs, inverse_scales, strict=True)]
