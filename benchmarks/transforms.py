"""What to compare our transforms with, for rounded activations: random Hadamard matrices, any orthogonal ones; and weights that
are not rounded at all.

All are strategies of the walk (`optimize.strategies`); what they fit and round otherwise is what the recipe says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pairquant.core.grids import stored
from pairquant.core.linear import Transform, rotated_weight
from pairquant.models.rounded_inputs import InputRounding, round_inputs
from pairquant.optimize.search import Problem, loss_and_gradients
from pairquant.optimize.strategies import BlockWork, Rounding
from pairquant.spec.options import QuantConfig


def hadamard_transform(channels: int, group_size: int, seed: int, device: torch.device) -> Transform:
    """Return a random Hadamard matrix for each group as a transform of ours, exactly.

    log2(g) rotations by a quarter of pi, between channels whose numbers differ in one binary digit, multiply out to a matrix of
    entries ±1/√g. Random signs of the channels are channel scales of ±1.
    """
    rounds = group_size.bit_length() - 1
    local = torch.arange(group_size)
    firsts = [local[(local >> k) % 2 == 0] for k in range(rounds)]
    pairs = torch.stack([torch.stack((low, low + (1 << k)), -1).flatten() for k, low in enumerate(firsts)])
    pairs = pairs.repeat(1, channels // group_size)
    signs = torch.randint(0, 2, (channels,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    theta = torch.full((rounds, channels // 2), math.pi / 4)
    return Transform.build(theta.to(device), pairs.to(torch.int16).to(device), signs.to(device), group_size)


@dataclass
class Plain(Rounding):
    """Rounds weights by the moments of inputs that are not rounded, as methods do that quantize weights first."""

    def _fit_to_rounding(
        self, work: BlockWork, targets: dict[str, Tensor], transforms: Mapping[str, Transform]
    ) -> dict[str, Tensor]:
        return {}


@dataclass
class Hadamard(Rounding):
    """A random Hadamard matrix for each group, the same for all linears of one input. fits: whether weights answer rounded inputs."""

    fits: bool = False

    def _transforms(self, work: BlockWork, targets: Mapping[str, Tensor]) -> dict[str, Transform]:
        found = {}
        for m in work.moments:
            for path in m.readers:
                layout, seed = work.layouts[path], work.seeds[m.readers[0]]
                found[path] = hadamard_transform(layout.in_features, layout.group_size, seed, work.device)
        return found

    def _fit_to_rounding(
        self, work: BlockWork, targets: dict[str, Tensor], transforms: Mapping[str, Transform]
    ) -> dict[str, Tensor]:
        return super()._fit_to_rounding(work, targets, transforms) if self.fits else {}


class Orthogonal(Rounding):
    """Any orthogonal matrix for each group, and channel scales, learned on the same loss as our rotations.

    No checkpoint holds such matrices: the block computes with the decoded weights, and `work.packed` stays empty.
    """

    def quantize(self, work: BlockWork) -> None:
        packed = self.rounded(work)
        roundings = {}
        for path, linear in packed.items():
            transform = self.found[path]
            work.block.sites[path].put(transform.weight_out(rotated_weight(linear)))
            if (rounding := InputRounding.of(transform, work.layouts[path])) is not None:
                roundings[path] = rounding
        round_inputs(work.block.sites, roundings)

    def _transforms(self, work: BlockWork, targets: Mapping[str, Tensor]) -> dict[str, Transform]:
        hessians = work.hessians
        self.found: dict[str, Transform] = {}
        for group in work.groups:
            (path,) = group
            spec = work.layouts[path].spec
            weight = targets[path]
            problem = Problem(weight, hessians[path], work.seeds[path], spec, self._noise(work, group, weight))
            self.found[path] = learned_orthogonal(problem, work.config)
        return dict(self.found)


def learned_orthogonal(problem: Problem, config: QuantConfig) -> Transform:
    """Return the best matrices found for a problem, by the recipe's optimizer and rates.

    The tensors of angles that the transform has are those of the identity: only its matrices count.
    """
    recipe, g, device = config.recipe, problem.spec.group_size, problem.weight.device
    norm = (problem.weighted(problem.weight) * problem.weight).sum()
    skew = torch.zeros(problem.channels // g, g, g, device=device, requires_grad=True)
    log_scale = torch.zeros(problem.channels, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [skew, log_scale], lr=recipe.learning_rate, betas=(0.9, 0.95), eps=1e-10, weight_decay=0
    )
    best, kept = math.inf, (skew.detach().clone(), log_scale.detach().clone())
    for step in range(recipe.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        # Every entry of a dense matrix moves at each step: a tenth of the rate of single angles.
        optimizer.param_groups[0]["lr"] = (
            0.1 * recipe.learning_rate * (recipe.final_rate + (1 - recipe.final_rate) * cosine)
        )
        with torch.enable_grad():
            matrix, a = torch.linalg.matrix_exp(skew - skew.mT), log_scale.exp().view(-1, g)
            into, out_of = matrix * a[:, :, None], matrix.mT / a[:, None, :]
        loss, grad_into, grad_out_of = loss_and_gradients(problem, into.detach(), out_of.detach())
        slopes = [slope for slope in (grad_into, grad_out_of) if slope is not None]
        if problem.noise is not None:
            added, *more = problem.noise.loss_and_gradients(into, out_of)
            loss, slopes = loss + added, [a + b for a, b in zip(slopes, more, strict=True)]
        if (now := loss.item()) < best:
            best, kept = now, (skew.detach().clone(), log_scale.detach().clone())
        optimizer.zero_grad()
        torch.autograd.backward((into, out_of), [slope / norm for slope in slopes])
        optimizer.step()
    skew, log_scale = kept
    identity = Transform.identity(problem.channels, g, problem.spec.rotations, device)
    return replace(
        identity, matrix=torch.linalg.matrix_exp(skew - skew.mT), inverse_scales=stored(log_scale.neg().exp())
    )


@dataclass
class KeptWeights(Rounding):
    """Rounds activations alone, after the transforms of the base: the least that rounding weights too can lose.

    The transforms are those of rounded weights and activations. No checkpoint holds such weights: `work.packed` stays empty.
    """

    def quantize(self, work: BlockWork) -> None:
        targets = {path: work.rows(path).float() for path in work.paths}
        found = self._transforms(work, targets)
        roundings = {path: InputRounding.of(transform, work.layouts[path]) for path, transform in found.items()}
        round_inputs(work.block.sites, {path: rounding for path, rounding in roundings.items() if rounding is not None})


class KeptHadamard(KeptWeights, Hadamard):
    """Activations alone are rounded, after a random Hadamard matrix for each group."""


class KeptOrthogonal(KeptWeights, Orthogonal):
    """Activations alone are rounded, after learned orthogonal matrices."""
