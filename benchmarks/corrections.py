"""What is added to a rounded linear to take back a part of its error: y = Ŵ x + B φ(A x), with thin A [r, C] and B [N, r].

Kinds: `svd`, φ(u) = u, the best there is under the second moments of the linear's inputs, in closed form; `linear`, the same and
then trained with the block; `silu` and `relu`, light networks: φ(u) = u + s · f(u) for each of the r numbers, trained too. Their
s begins at zero, so that all kinds begin as the closed form. A, B and s are in fp16, in training as well. For models without experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pairquant.core.grids import stored
from pairquant.core.linear import Transform, decode
from pairquant.core.rounding import proxy_error
from pairquant.optimize.blockwise import refit
from pairquant.optimize.stages import RefitStage, straight_through
from pairquant.optimize.strategies import BlockWork, Rounding
from pairquant.spec.linear import PackedLinear

#: Kind → f of its φ.
KINDS: dict[str, Callable[[Tensor], Tensor] | None] = {"svd": None, "linear": None, "silu": F.silu, "relu": F.relu}
DAMPING = 0.01


def low_rank(residual: Tensor, hessian: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, C] and B [N, r] whose product B A is the best approximation of the residual [N, C] under H [C, C].

    With H = L Lᵀ, the residual times L is cut to its r largest singular values, and L⁻¹ takes it back.
    """
    damped = hessian.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    lower = torch.linalg.cholesky(damped)
    left, right = largest(residual.double() @ lower, rank)
    return torch.linalg.solve_triangular(lower, right, upper=False, left=False).float(), left.float()


def largest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U √S [N, rank] and √S Vᵀ [rank, C] of the largest singular values of a float64 matrix [N, C].

    From the eigenvectors of the smaller Gram matrix: a GPU takes seconds for a singular value decomposition.
    """
    if matrix.shape[0] > matrix.shape[1]:
        right, left = largest(matrix.T, rank)
        return left.T, right.T
    u = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:]
    rows = u.T @ matrix
    s = rows.norm(dim=1)
    return u * s.sqrt(), rows / s.sqrt()[:, None]


@dataclass
class Correction:
    """One linear's. values: by name, float32: A "inner" [r, C], B "outer" [N, r] and s "bend" [r], each divided by its unit.

    units: what one step of the optimizer is measured in, so that channels and layers of any size learn alike.
    """

    kind: str
    values: dict[str, Tensor]
    units: dict[str, Tensor]

    @classmethod
    def of(cls, kind: str, residual: Tensor, hessian: Tensor, tokens: int, rank: int) -> Correction:
        """Begin as the closed form; hessian: the sum over so many tokens. The r numbers A x have a mean square of 1 there."""
        inner, outer = low_rank(residual, hessian, rank)
        size = ((inner @ hessian) * inner).sum(1).div(tokens).sqrt().clamp(min=1e-12)
        tensors = {"inner": inner / size[:, None], "outer": outer * size}
        variances = hessian.diagonal() / tokens
        units = {
            "inner": variances.clamp(min=1e-6 * variances.mean()).mul(len(variances)).rsqrt(),
            "outer": tensors["outer"].square().mean().sqrt().clamp(min=1e-12),
        }
        if KINDS[kind] is not None:
            tensors["bend"], units["bend"] = torch.zeros_like(size), torch.ones_like(size[0])
        return cls(kind, {name: tensor / units[name] for name, tensor in tensors.items()}, units)

    @property
    def trained(self) -> list[Tensor]:
        return [] if self.kind == "svd" else list(self.values.values())

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored, by the names of the module's parameters; differentiable in `values`."""
        whole = {f"correction_{name}": value * self.units[name] for name, value in self.values.items()}
        return {name: straight_through(tensor, stored(tensor)) for name, tensor in whole.items()}

    def attach(self, module: nn.Module) -> None:
        """Let a linear module add this correction to its output, from parameters of its own."""
        bending = KINDS[self.kind]
        for name, tensor in self.tensors().items():
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

        def add(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            hidden = F.linear(arguments[0], module.correction_inner)
            if bending is not None:
                hidden = hidden + module.correction_bend * bending(hidden)
            return output + F.linear(hidden, module.correction_outer)

        module.register_forward_hook(add)

    def settle(self, module: nn.Module) -> None:
        """Give the module the tensors as they are now."""
        for name, tensor in self.tensors().items():
            module.get_parameter(name).copy_(tensor)


def added_bits(kind: str, rank: int, sizes: list[tuple[int, int]]) -> float:
    """Bits per weight that corrections add to linears of these sizes, N and C."""
    numbers = sum(rank * (n + c) + (rank if KINDS[kind] is not None else 0) for n, c in sizes)
    return 16 * numbers / sum(n * c for n, c in sizes)


class CorrectedStage(RefitStage):
    """`RefitStage` that trains corrections too. corrections: by the path of their module; rate: of learning, for them."""

    def __init__(self, corrections: Mapping[str, Correction], rate: float, *arguments: Any):
        super().__init__(*arguments)
        self.corrections = corrections
        self.trained += [(tensor, rate) for each in corrections.values() for tensor in each.trained]

    def weights(self) -> dict[str, Tensor]:
        found = {
            f"{place}.{name}": tensor
            for place, each in self.corrections.items()
            for name, tensor in each.tensors().items()
        }
        return super().weights() | found


class Compensating(Rounding):
    """`Rounding`, a correction of every linear, and then, where the recipe refits, the training of both together.

    error_left: of each linear, its squared error with the closed form over that without; losses: of each block, before and after
    the training.
    """

    def __init__(self, kind: str, rank: int, rate: float):
        self.kind, self.rank, self.rate = kind, rank, rate
        self.error_left: list[float] = []
        self.losses: list[tuple[float, float]] = []

    def quantize(self, work: BlockWork) -> None:
        packed, sites = self.rounded(work), work.block.sites
        corrections = {}
        for moments in work.moments:
            for path in moments.readers:
                corrections[path] = self._correction(packed[path], self.wanted[path], moments.hessian, moments.tokens)
                corrections[path].attach(sites[path].module)
        recipe = work.config.recipe
        if recipe.refit is not None:
            by_place = {sites[path].place: each for path, each in corrections.items()}
            how = (work.block, work.groups, packed, recipe, recipe.refit, work.kept_as, work.device)
            packed = refit(CorrectedStage(by_place, self.rate, *how), work.training())
            losses = [report["validation"] for report in work.history]
            self.losses.append((losses[0], min(losses)))
        work.settle(packed, trained=recipe.refit is not None)
        for path, each in corrections.items():
            each.settle(sites[path].module)

    def _round(
        self,
        work: BlockWork,
        targets: dict[str, Tensor],
        transforms: Mapping[str, Transform],
        hessians: Mapping[str, Tensor],
    ) -> dict[str, PackedLinear]:
        self.wanted = dict(targets)
        return super()._round(work, targets, transforms, hessians)

    def _correction(self, packed: PackedLinear, target: Tensor, hessian: Tensor, tokens: int) -> Correction:
        residual = target - decode(packed)
        found = Correction.of(self.kind, residual, hessian, tokens, self.rank)
        inner, outer = (found.tensors()[f"correction_{name}"] for name in ("inner", "outer"))
        errors = [proxy_error(target, target - left, hessian) for left in (residual, residual - outer @ inner)]
        self.error_left.append(errors[1] / max(errors[0], 1e-30))
        return found
