"""Accuracy of recipes side by side, on one model, one calibration text and two evaluation texts, in one run.

    python benchmarks/bench_quality.py MODEL [--out FILE] [--group-size 64] [--device auto] RECIPE [RECIPE …]

A RECIPE is a preset, with options of `QuantConfig` or `Recipe` after a colon: `fast`, `rtn:bits=3`,
`fast:bits=3,steps=75`,
`paper:training.epochs=2,share_rotations=True`. The setting is that of the project's results table (setting.py).
One JSON line a recipe.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from quantized import quantized, surroundings
from recipes import config_from
from setting import SETTING, numbers, opened

from pairquant.evaluation.quality import measure
from pairquant.support.devices import resolve_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--group-size", type=int, default=SETTING["group_size"])
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    setting = {**SETTING, "group_size": arguments.group_size}
    configs = {text: config_from(text, **setting) for text in arguments.recipes}

    device = resolve_device(arguments.device)
    original, tokenizer, texts = opened(arguments.model, device)
    for text, config in configs.items():
        made = quantized(original, tokenizer, config)
        row = {
            "recipe": text,
            "model": Path(arguments.model).name,
            "group_size": config.group_size,
            "bits_per_weight": round(made.bits_per_weight, 3),
            "seconds": round(made.seconds, 1),
            **{name: numbers(measure(made.model, windows, original)) for name, windows in texts.items()},
            **surroundings(device),
        }
        print(json.dumps(row), flush=True)
        if arguments.out:
            with arguments.out.open("a") as out:
                out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
