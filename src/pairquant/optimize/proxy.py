"""Fitting transforms on the quadratic proxy (preset `fast`).

For a linear with weight W and input second moments H = XᵀX, minimise over angles and channel scales

    tr(E H Eᵀ) / tr(W H Wᵀ),   E = W - Ŵ,   Ŵ = (Q((W · diag(a)) R) Rᵀ) · diag(1/a),

by AdamW with a cosine rate, keeping each problem's best step. The tokens never appear: H has seen them all. All
problems of a block are fitted together: their angles lie side by side, and one batched product builds every R.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import QuantConfig
from ..core.linear import Transform
from ..core.pairs import PairSelection, magnitude_rank, random_rank, select_pairs
from ..core.quantizer import fake_quantize
from ..core.rotation import givens_positions, rotate_dense, rotation_matrix


@dataclass(frozen=True)
class Problem:
    """One transform to find. weight: float32 [N, C], the rows of all linears that will share it; hessian: [C, C]."""

    weight: Tensor
    hessian: Tensor
    seed: int

    @property
    def channels(self) -> int:
        return self.weight.shape[1]


class QuadraticError(torch.autograd.Function):
    """tr(E H Eᵀ) with E = W - Ŵ. Its gradient, -2 E H, is the product that its value needs anyway."""

    @staticmethod
    def forward(ctx, approximation: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
        error = weight - approximation
        weighted = error @ hessian
        ctx.save_for_backward(weighted)
        return (weighted * error).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (weighted,) = ctx.saved_tensors
        return weighted * (-2 * grad), None, None


def fit_transforms(problems: list[Problem], config: QuantConfig) -> list[Transform]:
    """The best transform found for each problem, with fp16-rounded values, on the problems' device."""
    if not config.recipe.transform:
        return [Transform.identity(p.channels, int(config.group_size), device=p.weight.device) for p in problems]
    search = _Search(problems, config)
    for step in range(config.recipe.steps):
        search.step(step)
    search.keep_best(search.losses())
    return search.transforms()


def select_for(problem: Problem, config: QuantConfig) -> PairSelection:
    """The pairs of one problem, by the configured method, from the problem's own seed."""
    g = int(config.group_size)
    if config.pair_selection == "magnitude":
        rank = magnitude_rank(problem.weight.abs().mean(0), g)
    else:
        rank = random_rank(problem.channels // g, g, torch.Generator().manual_seed(problem.seed))
    return select_pairs(rank, config.rotations)


class _Search:
    """All problems' parameters, concatenated: theta [K, ΣC/2] from zero, log_scale (log a) [ΣC] from zero."""

    def __init__(self, problems: list[Problem], config: QuantConfig):
        device = problems[0].weight.device
        self.problems, self.config = problems, config
        self.group_size = int(config.group_size)
        self.sizes = [p.channels for p in problems]
        selections = [select_for(p, config) for p in problems]
        self.pairs = torch.cat([s.pairs for s in selections], dim=1).to(device)
        self.free = torch.cat([s.free for s in selections], dim=1).to(device)
        self.positions = givens_positions(self.pairs, self.group_size)
        self.norms = [((p.weight @ p.hessian) * p.weight).sum().clamp(min=1e-30) for p in problems]
        self.theta = torch.zeros(self.free.shape, device=device, requires_grad=True)
        self.log_scale = torch.zeros(sum(self.sizes), device=device, requires_grad=True)
        self.best_theta, self.best_log_scale = self.theta.detach().clone(), self.log_scale.detach().clone()
        self.best_loss = torch.full((len(problems),), torch.inf, device=device)
        sizes = torch.tensor(self.sizes, device=device)
        self.problem_of_channel = torch.arange(len(problems), device=device).repeat_interleave(sizes)
        self.optimizer = torch.optim.AdamW(
            [self.theta, self.log_scale], lr=config.recipe.learning_rate, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0
        )

    def losses(self) -> Tensor:
        """Relative proxy error of each problem."""
        g, a = self.group_size, self.log_scale.exp().view(-1, self.group_size)
        matrices = rotation_matrix(self.theta * self.free, self.pairs, g, self.positions)
        # With the scale folded into the small matrices, nothing of the weight's size is multiplied by it.
        counts = [c // g for c in self.sizes]
        into = (matrices * a[:, :, None]).split(counts)
        out_of = (matrices.mT / a[:, None, :]).split(counts)
        losses = []
        for problem, forth, back, norm in zip(self.problems, into, out_of, self.norms, strict=True):
            rotated = rotate_dense(problem.weight, forth)
            rounded = fake_quantize(rotated, self.config.bits, g, self.config.symmetric)
            losses.append(QuadraticError.apply(rotate_dense(rounded, back), problem.weight, problem.hessian) / norm)
        return torch.stack(losses)

    def step(self, step: int) -> None:
        recipe = self.config.recipe
        cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        self.optimizer.param_groups[0]["lr"] = recipe.learning_rate * (
            recipe.final_rate + (1 - recipe.final_rate) * cosine
        )
        losses = self.losses()
        self.keep_best(losses.detach())
        self.optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        self.optimizer.step()

    @torch.no_grad()
    def keep_best(self, losses: Tensor) -> None:
        better = losses < self.best_loss
        by_channel = better[self.problem_of_channel]
        self.best_loss = torch.where(better, losses, self.best_loss)
        self.best_theta = torch.where(by_channel[::2], self.theta, self.best_theta)
        self.best_log_scale = torch.where(by_channel, self.log_scale, self.best_log_scale)

    def transforms(self) -> list[Transform]:
        theta = (self.best_theta * self.free).split([c // 2 for c in self.sizes], dim=1)
        pairs, inverse_scales = self.pairs.split(self.sizes, dim=1), self.best_log_scale.neg().exp().split(self.sizes)
        return [Transform.build(t, p, s, self.group_size) for t, p, s in zip(theta, pairs, inverse_scales, strict=True)]
