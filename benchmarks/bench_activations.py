"""Rounded activations: KL and perplexity of a model with 4-bit weights, by format and by method, in one run.

    python benchmarks/bench_activations.py MODEL --output FILE [--activations none,int8] [--methods hadamard,fast] [--seeds 0,1,2]

Methods: none, no transform, GPTQ; rtn-hadamard, a random Hadamard matrix per group, weights rounded to nearest; hadamard, the
same with GPTQ; hadamard-fit, the same with all of our rounding; orthogonal, any orthogonal matrix per group, learned on our
loss; paper, fast and best, the presets; fast-trained and best-trained, the same with a last training of the whole model
(`--end-to-end`); alone-none, alone-hadamard, alone-fast and alone-orthogonal, activations alone: weights are not rounded. With
"mx-" before it, a method rounds weights to MXFP4 too (`--weights mxfp4`). Text is that of setting.py. One JSON line a row; rows that the file has already are
left out, and a seed's rows are made before the next seed's. Groups: 64 by default, 128 for models such as Gemma.

A row's name, such as "int4/fast", is the format and the method. Everything is simulated: products are computed in 32 bits, from
rounded values.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from experiment import Experiment, parser_of, settled, trained
from setting import calibration_tokens, numbers
from transforms import Hadamard, KeptHadamard, KeptOrthogonal, KeptWeights, Orthogonal, Plain

from pairquant.evaluation.quality import measure
from pairquant.models.planning import plan_model
from pairquant.optimize import walk as walking
from pairquant.optimize.strategies import Rounding
from pairquant.optimize.walk import Walk
from pairquant.spec.options import QuantConfig
from pairquant.spec.recipe import PRESETS, EndToEnd, Recipe

WITH = {"fits_transform": True}
TRAINED = {"end_to_end": EndToEnd()}
#: Method → preset, settings of its recipe that differ, and the strategy in place of the recipe's.
METHODS: dict[str, tuple[str, dict[str, Any], Callable[[], Rounding] | None]] = {
    "fast": ("fast", {}, None),
    "hadamard": ("gptq", WITH, Hadamard),
    "best": ("best", {}, None),
    "paper": ("paper", {}, None),
    "none": ("gptq", {}, Plain),
    "rtn-hadamard": ("rtn", WITH, Hadamard),
    "hadamard-fit": ("fast", {}, lambda: Hadamard(fits=True)),
    "orthogonal": ("fast", {}, Orthogonal),
    "fast-trained": ("fast", TRAINED, None),
    "best-trained": ("best", TRAINED, None),
    "alone-none": ("gptq", {}, KeptWeights),
    "alone-hadamard": ("gptq", WITH, KeptHadamard),
    "alone-fast": ("fast", {}, KeptWeights),
    "alone-orthogonal": ("fast", {}, KeptOrthogonal),
}
#: What says before a method's name that weights are in MXFP4.
MX = "mx-"
#: Seed and number of windows for a last training → calibration windows, and after them those.
CUT: dict[tuple[int, int], torch.Tensor] = {}
FORMATS = ("none", "int8", "fp8", "int4", "mxfp4")


def config_of(method: str, activations: str, seed: int, base: QuantConfig) -> QuantConfig:
    """The options of one row; base: has the text and the groups."""
    preset, changes, _ = METHODS[method.removeprefix(MX)]
    recipe: Recipe = replace(PRESETS[preset], **changes)
    rotations = int(base.group_size).bit_length() - 1 if "hadamard" in method else base.rotations
    return replace(
        base,
        preset=preset,
        recipe=recipe,
        rotations=rotations,
        seed=seed,
        activations=None if activations == "none" else activations,
        weights="mxfp4" if method.startswith(MX) else None,
    )


def main() -> None:
    parser = parser_of(__doc__, samples=64, windows=80)
    parser.set_defaults(seq_len=1024)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--activations", default=",".join(FORMATS))
    parser.add_argument(
        "--methods", default=",".join([*METHODS, *(f"{MX}{name}" for name in ("rtn-hadamard", "hadamard", "fast"))])
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--blocks", type=int, help="quantize only so many blocks, to try things out")
    options = parser.parse_args()
    if options.blocks is not None and "-trained" in options.methods:
        parser.error(
            "--blocks leaves blocks as they are, and the last training needs all: leave it or the trained methods out"
        )
    experiment = Experiment.of(options)
    base = replace(experiment.config, group_size=options.group_size)
    done = _done(options.output)
    for seed in map(int, options.seeds.split(",")):
        for activations in options.activations.split(","):
            for method in options.methods.split(","):
                config = config_of(method, activations, seed, base)
                facts = {
                    "row": f"{activations}/{method}", "seed": seed, "group_size": options.group_size, "bits": config.bits,
                    "model": Path(options.model).name, "samples": options.samples, "seq_len": options.seq_len,
                    "windows": options.windows, "blocks": options.blocks,
                }  # fmt: skip
                if tuple(facts.values()) not in done:
                    _make(experiment, facts, config, METHODS[method.removeprefix(MX)][2])


def _make(
    experiment: Experiment, facts: dict[str, Any], config: QuantConfig, strategy: Callable[[], Rounding] | None
) -> None:
    """Quantize, measure, print, and add the row to the file."""
    options, device = experiment.options, experiment.device
    every = _windows(experiment, config)
    tokens, fresh = every[: config.samples], every[config.samples :]
    model, started, usual = copy.deepcopy(experiment.original), time.perf_counter(), walking.strategy_for
    plan, blocks = plan_model(model, config)
    walking.strategy_for = usual if strategy is None else lambda _: strategy()
    try:
        results = list(Walk(model, blocks[: options.blocks], plan, config, device, tokens).run())
    finally:
        walking.strategy_for = usual
    errors = [error for result in results for error in result.errors.values()]
    curve: list[float] = []
    start: dict[str, Any] = {}
    if config.recipe.end_to_end is not None:
        start = {
            text: numbers(measure(model, windows, experiment.original)) for text, windows in experiment.texts.items()
        }
        found = trained(experiment.original, config, results, fresh, lambda _, kl: curve.append(kl))
        model = settled(experiment.original, config, found)
    row = {
        **facts, "simulated": True, "seconds": round(time.perf_counter() - started, 1),
        "mean_error": round(sum(errors) / len(errors), 6) if errors else None,
        "training_kl": [round(kl, 5) for kl in curve], "before_training": start,
        **{text: numbers(measure(model, windows, experiment.original)) for text, windows in experiment.texts.items()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    found = {text: (round(row[text]["kl"], 4), round(row[text]["perplexity"], 3)) for text in experiment.texts}
    print(facts["row"], facts["seed"], found, row["seconds"], flush=True)
    with options.output.open("a") as out:
        out.write(json.dumps(row) + "\n")


def _windows(experiment: Experiment, config: QuantConfig) -> torch.Tensor:
    """The windows of a seed, which are cut once: tokenizing takes longer than a row on a GPU. Those for a last training follow."""
    last = config.recipe.end_to_end
    more = 0 if last is None else last.fresh * config.samples
    if (config.seed, more) not in CUT:
        CUT[config.seed, more] = calibration_tokens(experiment.tokenizer, config, more)
    return CUT[config.seed, more]


def _done(file: Path) -> set[tuple[Any, ...]]:
    """The rows that a file has, by what tells rows apart."""
    names = ("row", "seed", "group_size", "bits", "model", "samples", "seq_len", "windows", "blocks")
    lines = file.read_text().splitlines() if file.exists() else []
    return {tuple(json.loads(line)[name] for name in names) for line in lines}


if __name__ == "__main__":
    main()
