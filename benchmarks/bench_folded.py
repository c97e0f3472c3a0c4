"""Transforms folded into the weights beside those that run: KL of a model, at equal bits and groups, in one run.

    python benchmarks/bench_folded.py MODEL --output FILE [--preset quick] [--samples 12] [--seq-len 512] [--windows 4]

none: no transform; scales: channel scales alone, stored beside each layer; rotated: those and 8 rotations; folded: what `pairquant
fold` finds, nothing stored beside any layer; folded-scales: the same without rotations; folded-16: with 16. "plain" is the folded
model before it is quantized, in the dtype in which it is stored. Text and groups are those of setting.py. One JSON line a row.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from experiment import Experiment, parser_of

from pairquant.checkpoint.read import ModelFiles
from pairquant.jobs.fold import Silent as SilentFold
from pairquant.jobs.fold import fold
from pairquant.models.planning import plan_model
from pairquant.optimize.walk import Walk
from pairquant.spec.linear import bits_per_weight
from pairquant.spec.options import QuantConfig

#: Row → how the transform is held, and how many rotations it has.
ROWS = {
    "none": ("none", 0),
    "scales": ("rotated", 0),
    "rotated": ("rotated", 8),
    "folded": ("folded", 8),
    "folded-scales": ("folded", 0),
    "folded-16": ("folded", 16),
}


class Printed(SilentFold):
    """Prints what folding says, and when."""

    def stage(self, text: str) -> None:
        print(f"  {time.strftime('%X')} {text}", flush=True)

    def notice(self, text: str) -> None:
        print(f"  {text}", flush=True)


def main() -> None:
    parser = parser_of(__doc__, samples=12, windows=4)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--fold-steps", type=int, help="steps of the fit of folded transforms; default: the preset's")
    parser.add_argument("--rows", default=",".join(ROWS))
    options = parser.parse_args()
    experiment = Experiment.of(options)
    for name in options.rows.split(","):
        transform, rotations = ROWS[name]
        config = replace(
            experiment.config,
            bits=options.bits,
            group_size=options.group_size,
            rotations=rotations,
            transform=transform,
        )
        if transform == "folded":
            with tempfile.TemporaryDirectory() as directory:
                _folded(experiment, name, config, Path(directory) / "folded")
        else:
            model, _, seconds = experiment.quantized(config, experiment.tokens)
            experiment.note(_facts(name, config), model, seconds)


def _folded(experiment: Experiment, name: str, config: QuantConfig, directory: Path) -> None:
    """Fold, measure what that gives, quantize it without transforms, and measure again."""
    steps = experiment.options.fold_steps
    fitting = config if steps is None else replace(config, recipe=replace(config.recipe, steps=steps))
    summary = fold(experiment.options.model, directory, fitting, device=str(experiment.device), progress=Printed())
    model = ModelFiles.find(str(directory)).model(torch.float32, experiment.device)
    facts = {"errors": summary.errors, "fold_seconds": round(summary.seconds, 1), "fold_steps": fitting.recipe.steps}
    experiment.note({**_facts(f"{name}, plain", config), **facts}, model, summary.seconds)
    plain = replace(config, transform="none")
    started = time.perf_counter()
    plan, blocks = plan_model(model, plain)
    packed = [
        p
        for result in Walk(model, blocks, plan, plain, experiment.device, experiment.tokens).run()
        for p in result.packed.values()
    ]
    facts["bits_per_weight"] = round(bits_per_weight(p.layout for p in packed), 3)
    experiment.note({**_facts(name, config), **facts}, model, time.perf_counter() - started)


def _facts(name: str, config: QuantConfig) -> dict[str, Any]:
    return {"row": name, "bits": config.bits, "group_size": config.group_size, "rotations": config.rotations}


if __name__ == "__main__":
    main()
