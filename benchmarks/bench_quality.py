"""Accuracy of recipes side by side, on one model, one calibration text and two evaluation texts, in one run.

    python benchmarks/bench_quality.py MODEL [--out FILE] [--device auto] RECIPE [RECIPE …]

A RECIPE is a preset, with options of `QuantConfig` or `Recipe` after a colon: `fast`, `rtn:bits=3`,
`fast:bits=3,steps=75,share_rotations=True`. The setting is that of the project's results table: group size 64,
64 windows of 1024 tokens from WikiText-2 (validation), GSM8K (training) and Grimms' Fairy Tales; perplexity and KL
on 80 × 2048 tokens of the WikiText-2 test text and 30 × 2048 tokens of GSM8K test problems. One JSON line a recipe.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import time
from dataclasses import fields, replace
from pathlib import Path

import torch
import transformers

from pairquant.checkpoint.read import ModelFiles
from pairquant.config import PRESETS, QuantConfig, Recipe
from pairquant.devices import resolve_device
from pairquant.evaluate.quality import measure
from pairquant.layout import bits_per_weight
from pairquant.optimize.calibration import calibrate
from pairquant.optimize.layerwise import needs_text, quantize_blocks
from pairquant.text import documents, token_windows

DATA = Path(__file__).parent / "data"
CALIBRATION = (str(DATA / "wikitext2-valid.txt"), "default")
EVALUATION = {"wikitext2-test": (str(DATA / "wikitext2-test.txt"), 80), "gsm8k-test": ("default/gsm8k-test.jsonl", 30)}


def parse(text: str) -> QuantConfig:
    """ "fast:bits=3,steps=75" → the configuration."""
    preset, _, options = text.partition(":")
    call = ast.parse(f"dict({options})", mode="eval").body
    values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    of_recipe = {f.name for f in fields(Recipe)} & values.keys()
    recipe = replace(PRESETS[preset], **{name: values.pop(name) for name in of_recipe})
    setting = {"group_size": 64, "samples": 64, "seq_len": 1024, "calibration": CALIBRATION}
    return QuantConfig(**{**setting, "preset": preset, "recipe": recipe, **values})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    configs = {text: parse(text) for text in arguments.recipes}

    device = resolve_device(arguments.device)
    files = ModelFiles.find(arguments.model)
    tokenizer = files.tokenizer()
    original = files.model(torch.float32, device)
    texts = {
        name: token_windows(tokenizer, documents(source), 2048)[:count] for name, (source, count) in EVALUATION.items()
    }
    for text, config in configs.items():
        model, start = copy.deepcopy(original), time.perf_counter()
        tokens = None
        if needs_text(config):
            tokens = calibrate(tokenizer, config.calibration, config.samples, config.seq_len, config.seed).tokens
        packed = {
            path: p for result in quantize_blocks(model, tokens, config, device) for path, p in result.packed.items()
        }
        seconds = time.perf_counter() - start
        row = {
            "recipe": text,
            "bits_per_weight": round(bits_per_weight(p.layout for p in packed.values()), 3),
            "seconds": round(seconds, 1),
            **{name: vars(measure(model, windows, original)) for name, windows in texts.items()},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        print(json.dumps(row), flush=True)
        if arguments.out:
            with arguments.out.open("a") as out:
                out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
