"""Accuracy of recipes side by side, on one model, one calibration text and two evaluation texts, in one run.

    python benchmarks/bench_quality.py MODEL [--out FILE] [--device auto] RECIPE [RECIPE …]

A RECIPE is a preset, with options of `QuantConfig` or `Recipe` after a colon: `fast`, `rtn:bits=3`,
`fast:bits=3,steps=75`,
`paper:training.epochs=2,share_rotations=True`. The setting is that of the project's results table (setting.py).
One JSON line a recipe.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
import transformers
from recipes import config_from
from setting import SETTING, evaluation_windows, numbers

from pairquant.checkpoint.read import ModelFiles
from pairquant.evaluation.quality import measure
from pairquant.models.planning import plan_model
from pairquant.optimize.calibration import calibrate
from pairquant.optimize.walk import Walk
from pairquant.spec.linear import bits_per_weight
from pairquant.support.devices import resolve_device
from pairquant.support.windows import window_prefix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    configs = {text: config_from(text, **SETTING) for text in arguments.recipes}

    device = resolve_device(arguments.device)
    files = ModelFiles.find(arguments.model)
    tokenizer = files.tokenizer()
    original = files.model(torch.float32, device)
    texts = evaluation_windows(tokenizer)
    for text, config in configs.items():
        model, start = copy.deepcopy(original), time.perf_counter()
        tokens = held_out = None
        if config.recipe.needs_text:
            training = config.recipe.training
            count = config.samples + (training.validation_samples if training else 0)
            prefix = window_prefix(tokenizer, config.bos)
            tokens = calibrate(tokenizer, config.calibration, count, config.seq_len, config.seed, prefix=prefix).tokens
            tokens, held_out = tokens[: config.samples], tokens[config.samples :]
        plan, blocks = plan_model(model, config)
        walk = Walk(model, blocks, plan, config, device, tokens, held_out)
        packed = {path: p for result in walk.run() for path, p in result.packed.items()}
        seconds = time.perf_counter() - start
        row = {
            "recipe": text,
            "bits_per_weight": round(bits_per_weight(p.layout for p in packed.values()), 3),
            "seconds": round(seconds, 1),
            **{name: numbers(measure(model, windows, original)) for name, windows in texts.items()},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        print(json.dumps(row), flush=True)
        if arguments.out:
            with arguments.out.open("a") as out:
                out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
