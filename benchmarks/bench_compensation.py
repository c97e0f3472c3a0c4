"""Low-rank compensation of what rounding loses, against smaller groups and more bits, at equal size.

    python benchmarks/bench_compensation.py MODEL --output FILE [--cases bits:rank:group …] [--preset quick] [--samples 32]
        [--seq-len 512] [--windows 10] [--device auto]

A correction of rank r is the best there is under the second moments H = L Lᵀ of a linear's inputs: of the residual E = W - Ŵ
the product E L is cut to its r largest singular values, and L⁻¹ takes it back. Both factors are in fp16. Later blocks are
fitted on the corrected ones. One JSON line a case; bits_per_weight counts everything stored, the factors included.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from experiment import Experiment, parser_of
from torch import Tensor

from pairquant.core.linear import decode
from pairquant.core.rounding import proxy_error
from pairquant.optimize.strategies import BlockWork, Rounding

DAMPING = 0.01


def correction(residual: Tensor, hessian: Tensor, rank: int) -> Tensor:
    """The best approximation of rank `rank` of the residual [N, C] under H [C, C], with factors in fp16."""
    damped = hessian.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    lower = torch.linalg.cholesky(damped)
    whitened = residual.double() @ lower
    left, right = largest(whitened, rank)
    right = torch.linalg.solve_triangular(lower, right, upper=False, left=False)
    return left.half().float() @ right.half().float()


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


class Compensating(Rounding):
    """`Rounding`, then a low-rank correction of every linear."""

    def __init__(self, rank: int):
        self.rank, self.left = rank, []

    def quantize(self, work: BlockWork) -> None:
        packed, hessians = self.rounded(work), work.hessians
        for path, linear in packed.items():
            site = work.block.sites[path]
            original, rounded = site.weight.float().clone(), decode(linear)
            better = rounded + correction(original - rounded, hessians[path], self.rank) if self.rank else rounded
            errors = [proxy_error(original, w, hessians[path]) for w in (rounded, better)]
            self.left.append(errors[1] / max(errors[0], 1e-30))
            site.put(better)
        work.packed, work.errors = packed, dict.fromkeys(packed, 0.0)


def main() -> None:
    parser = parser_of(__doc__, samples=32, windows=10)
    cases = ["3:0:64", "3:8:64", "3:16:64", "3:0:32", "4:0:64", "4:8:64", "5:0:64"]
    parser.add_argument("--cases", nargs="+", default=cases)
    experiment = Experiment.of(parser.parse_args())
    for case in experiment.options.cases:
        bits, rank, group = map(int, case.split(":"))
        strategy = Compensating(rank)
        config = replace(experiment.config, bits=bits, group_size=group)
        model, plan, seconds = experiment.quantized(config, experiment.tokens, strategy)
        sizes = [(layout.out_features, layout.in_features) for layout in plan.layouts.values()]
        extra = sum(16 * rank * (n + c) for n, c in sizes) / sum(n * c for n, c in sizes)
        facts = {
            "bits": bits, "rank": rank, "group_size": group, "bits_per_weight": round(plan.bits_per_weight + extra, 4),
            "error_left": round(sum(strategy.left) / len(strategy.left), 4),
        }  # fmt: skip
        experiment.note(facts, model, seconds)


if __name__ == "__main__":
    main()
