"""Half of the weights zero in the rotated basis, against fewer bits, at equal size.

    python benchmarks/bench_sparsity.py MODEL --output FILE [--cases bits:pattern …] [--preset quick] [--samples 16]
        [--seq-len 512] [--windows 4] [--device auto]

pattern: "dense"; "2:4", two of every four weights of a row are zero; "half", any half of each 64 columns. Which ones is
decided as SparseGPT does (arXiv 2301.00774), by w² over the square of the inverse factor's diagonal, while rounding as GPTQ
does: the error of a column, zeroed or rounded, is corrected in those that follow. Transforms are those of the dense model.
bits_per_weight counts everything stored: kept codes, and where they are, in 1 bit a weight (two numbers of 2 bits for every
four, or a mask). One JSON line a case. Nothing here runs faster for being sparse: only the accuracy is measured.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from experiment import Experiment, parser_of
from torch import Tensor

from pairquant.core.linear import decode, transform_of
from pairquant.core.rounding import inverse_factor, proxy_error, search_range
from pairquant.optimize.strategies import BlockWork, Rounding

#: Columns among which "half" chooses, and those of "2:4".
AMONG = {"half": 64, "2:4": 4}
DAMPING = 0.01


def pruned(w: Tensor, hessian: Tensor, bits: int, group_size: int, pattern: str) -> Tensor:
    """Round w [N, C] under H [C, C] with half of its weights zero."""
    shrinks = (1.0, 0.9, 0.8)
    grid = search_range(w, hessian, bits, group_size, False, shrinks)
    factor = inverse_factor(hessian, DAMPING).float()
    w, found, step = w.clone(), torch.zeros_like(w), AMONG[pattern]
    for start in range(0, w.shape[1], step):
        here = slice(start, start + step)
        scores = (w[:, here] / factor.diagonal()[here]).square()
        if pattern == "half":  # of the whole block, whatever the row
            keep = scores >= scores.flatten().median()
        else:
            keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(step // 2, 1).indices, True)
        for j in range(start, start + step):
            scale, zero = grid.scale[:, j // group_size], grid.zero[:, j // group_size]
            rounded = ((w[:, j] / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero).mul(scale)
            found[:, j] = rounded * keep[:, j - start]
            error = (w[:, j] - found[:, j]) / factor[j, j]
            w[:, j + 1 :].addr_(error, factor[j, j + 1 :], alpha=-1)
    return found


class Pruning(Rounding):
    """`Rounding`, then again with half of the weights zero, in the basis that it found."""

    def __init__(self, pattern: str):
        self.pattern, self.errors = pattern, []

    def quantize(self, work: BlockWork) -> None:
        packed = self.rounded(work)
        for path, linear in packed.items():
            site, hessian, layout = work.block.sites[path], work.hessians[path], linear.layout
            original, weight = site.weight.float().clone(), decode(linear)
            if self.pattern != "dense":
                transform = transform_of(linear)
                turned, moments = transform.weight_in(original), transform.hessian_in(hessian.float())
                weight = transform.weight_out(pruned(turned, moments, layout.bits, layout.group_size, self.pattern))
            self.errors.append(proxy_error(original, weight, hessian))
            site.put(weight)
        work.packed, work.errors = packed, dict.fromkeys(packed, 0.0)


def main() -> None:
    parser = parser_of(__doc__, samples=16, windows=4)
    parser.add_argument("--cases", nargs="+", default=["3:dense", "4:2:4", "4:half", "4:dense"])
    experiment = Experiment.of(parser.parse_args())
    for case in experiment.options.cases:
        width, _, pattern = case.partition(":")
        bits, strategy = int(width), Pruning(pattern)
        model, plan, seconds = experiment.quantized(replace(experiment.config, bits=bits), experiment.tokens, strategy)
        stored = plan.bits_per_weight - (0 if pattern == "dense" else bits / 2 - 1)
        error = sum(strategy.errors) / len(strategy.errors)
        facts = {"bits": bits, "pattern": pattern, "bits_per_weight": round(stored, 4), "error": round(error, 5)}
        experiment.note(facts, model, seconds)


if __name__ == "__main__":
    main()
