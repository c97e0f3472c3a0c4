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

import argparse
import copy
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from setting import SETTING, calibration_tokens, numbers, opened
from torch import Tensor

from pairquant.core.linear import decode, transform_of
from pairquant.core.rounding import inverse_factor, proxy_error, search_range
from pairquant.evaluation.quality import measure
from pairquant.models.planning import plan_model
from pairquant.optimize import walk as walking
from pairquant.optimize.strategies import BlockWork, Rounding
from pairquant.optimize.walk import Walk
from pairquant.spec.options import QuantConfig
from pairquant.support.devices import resolve_device

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=["3:dense", "4:2:4", "4:half", "4:dense"])
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = resolve_device(options.device)
    original, tokenizer, texts = opened(options.model, device)
    texts = {name: windows[: options.windows] for name, windows in texts.items()}
    setting = SETTING | {"samples": options.samples, "seq_len": options.seq_len}
    base = QuantConfig(preset=options.preset, **setting)
    tokens = calibration_tokens(tokenizer, base)
    for case in options.cases:
        width, _, pattern = case.partition(":")
        bits = int(width)
        config = replace(base, bits=bits)
        model, strategy, start = copy.deepcopy(original), Pruning(pattern), time.perf_counter()
        plan, blocks = plan_model(model, config)
        walking.strategy_for = lambda _, strategy=strategy: strategy
        for _ in Walk(model, blocks, plan, config, device, tokens).run():
            pass
        stored = plan.bits_per_weight - (0 if pattern == "dense" else bits / 2 - 1)
        row = {
            "bits": bits, "pattern": pattern, "bits_per_weight": round(stored, 4),
            "error": round(sum(strategy.errors) / len(strategy.errors), 5), "preset": options.preset,
            "samples": options.samples, "seq_len": options.seq_len, "seconds": round(time.perf_counter() - start, 1),
            **{text: numbers(measure(model, windows, original)) for text, windows in texts.items()},
            "model": Path(options.model).name, "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        }  # fmt: skip
        print(case, row["bits_per_weight"], row["error"], {t: round(row[t]["kl"], 4) for t in texts}, flush=True)
        with options.output.open("a") as out:
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
