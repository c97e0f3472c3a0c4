"""Divergence against size: one width for all layers, and mixed plans of the same sizes, in one run.

    python benchmarks/bench_mixed.py MODEL --output FILE [--group-size 64] [--preset fast] [--uniform 2 3 4 5 6 8]
        [--between 1] [--candidates bits:2|3|4|5|6|8] [--device auto] [--keep MEASURED]
    python benchmarks/bench_mixed.py MODEL --output FILE --rotated 1 0.75 0.5

With `--rotated`, one width for all, and a transform for these shares of the layers' inputs. Otherwise mixed plans are made
for the bits per weight of each uniform width, and for `--between` sizes between two of them. All sensitivities are measured
once. The setting is that of the project's results table (setting.py). One JSON line a plan; `--plans DIR` also writes each
mixed plan as a file that `bench_end_to_end.py --plan` and `pairquant quantize --plan` read.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from setting import SETTING, calibration_tokens, numbers, opened

from pairquant.evaluation.quality import measure
from pairquant.models.planning import plan_model
from pairquant.optimize.allocation import allocate, forms_of, mixed_plan, units_of
from pairquant.optimize.homes import InPlace
from pairquant.optimize.sensitivity import Measurement, Sensitivity
from pairquant.optimize.walk import Walk
from pairquant.spec.linear import bits_per_weight
from pairquant.spec.options import QuantConfig
from pairquant.support.devices import resolve_device


def sizes_between(uniform: list[float], count: int) -> list[float]:
    """The sizes themselves, and so many between each two."""
    found = list(uniform)
    for low, high in pairwise(uniform):
        found += [low + (high - low) * i / (count + 1) for i in range(1, count + 1)]
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--uniform", type=int, nargs="*", default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--also", type=float, nargs="*", default=[], help="more sizes in bits per weight")
    parser.add_argument("--between", type=int, default=1)
    parser.add_argument("--no-uniform", action="store_true", help="measure mixed plans only")
    parser.add_argument("--candidates", default="bits:2|3|4|5|6|8")
    parser.add_argument("--keep", type=Path, help="file for the sensitivities; read if it exists")
    parser.add_argument("--plans", type=Path, help="folder for the plans: mixed-4.250.json and so on")
    parser.add_argument(
        "--rotated", type=float, nargs="+", help="instead of sizes: shares of the inputs with a transform"
    )
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()

    device = resolve_device(options.device)
    original, tokenizer, texts = opened(options.model, device)
    config = QuantConfig(
        preset=options.preset, candidates=options.candidates, **{**SETTING, "group_size": options.group_size}
    )
    if options.rotated:
        config = replace(config, rotations="auto", candidates="rotations:0|8")
    tokens = calibration_tokens(tokenizer, config)
    as_asked, blocks = plan_model(original, config)
    forms = forms_of(as_asked, config)
    start = time.perf_counter()
    if options.keep and options.keep.exists():
        measured = Sensitivity.from_dict(json.loads(options.keep.read_text()), str(options.keep))
    else:
        measured = Measurement(original, blocks, forms, config, device, InPlace()).run(tokens)
    measuring = time.perf_counter() - start
    if options.keep:
        options.keep.write_text(json.dumps(measured.to_dict()))
    sites = {path: site for block in blocks for path, site in block.sites.items()}
    units = units_of(forms, as_asked.layouts, sites, measured.readers, measured.divergences)
    weights = sum(unit.weights for unit in units)

    def run(name: str, config: QuantConfig, predicted: float | None) -> None:
        model, start = copy.deepcopy(original), time.perf_counter()
        plan, blocks = plan_model(model, config)
        packed = {
            p: of
            for result in Walk(model, blocks, plan, config, device, tokens).run()
            for p, of in result.packed.items()
        }
        row = {
            "plan": name, "model": Path(options.model).name, "preset": options.preset, "candidates": options.candidates,
            "bits_per_weight": round(bits_per_weight(p.layout for p in packed.values()), 4), "predicted": predicted,
            "seconds": round(time.perf_counter() - start, 1), "measuring_seconds": round(measuring, 1),
            **{text: numbers(measure(model, windows, original)) for text, windows in texts.items()},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }  # fmt: skip
        print(
            name,
            row["bits_per_weight"],
            predicted,
            {text: round(row[text]["kl"], 4) for text in texts},
            row["seconds"],
            flush=True,
        )
        with options.output.open("a") as out:
            out.write(json.dumps(row) + "\n")

    for share in options.rotated or ():
        choice = allocate(
            units, sum(max(form.bits for form in unit.forms) for unit in units), round(share * len(units))
        )
        each = replace(config, target=None, plan=replace(mixed_plan(choice), scales_alone=False))
        run(f"transforms for {choice.rotated} of {len(units)} inputs", each, choice.divergence)
    if options.rotated:
        return
    uniform = {}
    for bits in options.uniform:
        each = replace(config, bits=bits)
        uniform[bits] = bits_per_weight(plan_model(original, each)[0].layouts.values())
    for size in [*sizes_between(list(uniform.values()), options.between), *options.also]:
        choice = allocate(units, int(size * weights))
        plan = mixed_plan(choice)
        if options.plans:
            (options.plans / f"mixed-{size:.3f}.json").write_text(json.dumps(plan.to_dict()))
        run(f"mixed {size:.3f}", replace(config, plan=plan), choice.divergence)
    for bits in () if options.no_uniform else options.uniform:
        run(f"uniform {bits}", replace(config, bits=bits), None)


if __name__ == "__main__":
    main()
