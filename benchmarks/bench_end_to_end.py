"""What a training of the whole quantized model buys, for one start and several settings, in one run.

    python benchmarks/bench_end_to_end.py MODEL --output FILE [--start fast:bits=3] [--settings "" "epochs=6" …] [--device auto]

The model is quantized once by `--start` (see recipes.py), then trained end to end with each of `--settings`, which change
the defaults of `EndToEnd`. The setting is that of the project's results table (setting.py). One JSON line a training.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from experiment import settled, trained
from recipes import config_from
from setting import SETTING, calibration_tokens, numbers, opened

from pairquant.evaluation.quality import measure
from pairquant.models.planning import plan_model
from pairquant.optimize.walk import Walk
from pairquant.spec.linear import bits_per_weight
from pairquant.spec.mixed import MixedPlan
from pairquant.spec.recipe import EndToEnd
from pairquant.support.devices import resolve_device


def settings_in(text: str) -> dict[str, Any]:
    """The settings that a text names: "epochs=6,batch=8"."""
    return {
        name: ast.literal_eval(value) for name, _, value in (part.partition("=") for part in text.split(",") if part)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--start", default="fast")
    parser.add_argument("--settings", nargs="*", default=[""])
    parser.add_argument("--plan", type=Path, help="a plan for the start")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=SETTING["samples"])
    parser.add_argument("--windows", type=int, help="evaluate on so many windows of each text only")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()

    device = resolve_device(options.device)
    original, tokenizer, texts = opened(options.model, device)
    texts = {name: windows[: options.windows] for name, windows in texts.items()}
    config = config_from(options.start, **{**SETTING, "samples": options.samples, "group_size": options.group_size})
    config = replace(config, plan=MixedPlan.read(options.plan) if options.plan else None)
    settings = [EndToEnd(**settings_in(text)) for text in options.settings]
    every = calibration_tokens(tokenizer, config, max((how.fresh for how in settings), default=0) * config.samples)
    tokens, others = every[: config.samples], every[config.samples :]
    start, model = time.perf_counter(), copy.deepcopy(original)
    plan, blocks = plan_model(model, config)
    results = list(Walk(model, blocks, plan, config, device, tokens).run())
    walking = time.perf_counter() - start
    layouts = [packed.layout for result in results for packed in result.packed.values()]

    def note(how: EndToEnd | None, model: torch.nn.Module, seconds: float, curve: list[float]) -> None:
        row = {
            "start": options.start, "plan": str(options.plan) if options.plan else None, "end_to_end": asdict(how) if how is not None else None,
            "model": Path(options.model).name, "samples": config.samples, "seq_len": config.seq_len,
            "bits_per_weight": round(bits_per_weight(layouts), 4), "seconds": round(walking, 1),
            "end_to_end_seconds": round(seconds, 1), "training_kl": [round(kl, 5) for kl in curve],
            **{text: numbers(measure(model, windows, original)) for text, windows in texts.items()},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device.type == "cuda" else None,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }  # fmt: skip
        shown = {text: round(row[text]["kl"], 4) for text in texts}
        print(how, row["bits_per_weight"], shown, row["seconds"], row["end_to_end_seconds"], curve, flush=True)
        with options.output.open("a") as out:
            out.write(json.dumps(row) + "\n")

    note(None, settled(original, config, results), 0.0, [])
    for how in settings:
        each = replace(config, recipe=replace(config.recipe, end_to_end=how))
        pool = others[: how.fresh * config.samples] if how.fresh else tokens
        curve: list[float] = []
        start = time.perf_counter()
        found = trained(original, each, results, pool, lambda _, kl, to=curve: to.append(kl))
        seconds = time.perf_counter() - start
        note(how, settled(original, each, found), seconds, curve)


if __name__ == "__main__":
    main()
