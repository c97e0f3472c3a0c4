"""How well the sensitivities that plans are made from predict the divergence that single weights really cause.

python benchmarks/bench_sensitivity.py MODEL --output results.json [--every 7] [--group-size 64]
        [--candidates bits:2|3|4,rotations:0|8]

For every Nth weight and each form, the weight alone is replaced by its quantized form, and the divergence of the whole
model's output is measured. It is compared, by rank correlation, with the estimate of `optimize.sensitivity`, with the
output error tr(E H Eᵀ), and with that error relative to the output. Forms that a plan would not measure but complete from
others (`optimize.sensitivity.completed`) are measured here too, and compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import quantiles

import torch
from scipy.stats import spearmanr
from setting import CALIBRATION, evaluation_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from pairquant.core.rounding import proxy_terms
from pairquant.models.planning import plan_model
from pairquant.optimize import sensitivity
from pairquant.optimize.allocation import forms_of
from pairquant.optimize.calibration import calibrate
from pairquant.optimize.homes import InPlace
from pairquant.optimize.sensitivity import Measurement, completed, to_measure
from pairquant.spec.options import QuantConfig
from pairquant.support.devices import resolve_device


class Recording(Measurement):
    """A measurement of all forms that also keeps each error and its size at the layer's own output."""

    def _errors(self, block, moments):
        sensitivity.to_measure = list  # all of them
        found = super()._errors(block, moments)
        sensitivity.to_measure = to_measure
        hessians = {path: m.hessian for m in moments for path in m.readers}
        for path, of in found.items():
            for spec, error in of.items():
                weight = block.sites[path].weight.float()
                terms = proxy_terms(weight, weight - error.float(), hessians[path])
                self.kept[path, spec] = (error.cpu(), *terms.tolist())
        return found


def divergence(model, windows, reference) -> float:
    """Mean KL(original ‖ now), nats per token."""
    total = 0.0
    for window, log_p in zip(windows, reference, strict=True):
        log_q = model(window[None]).logits[0].float().log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    return total / len(windows)


@torch.no_grad()
def truths(model, kept, sites, windows) -> dict:
    reference = [model(window[None]).logits[0].float().log_softmax(-1) for window in windows]
    found = {}
    for (path, spec), (error, *_) in kept.items():
        weight = sites[path].weight.clone()
        sites[path].put(weight - error.to(weight.device, weight.dtype))
        found[path, spec] = divergence(model, windows, reference)
        sites[path].put(weight)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--every", type=int, default=7)
    parser.add_argument("--candidates", default="bits:2|3|4,rotations:0|8")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens for the true divergence")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = resolve_device(options.device)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = QuantConfig(group_size=options.group_size, candidates=options.candidates)
    plan, blocks = plan_model(model, config)
    forms = {path: of for i, (path, of) in enumerate(forms_of(plan, config).items()) if i % options.every == 0}
    tokens = calibrate(tokenizer, CALIBRATION, 64, 1024, 0).tokens
    measurement = Recording(model, blocks, forms, config, device, InPlace())
    measurement.kept = {}
    started = time.perf_counter()
    measured = measurement.run(tokens)
    seconds = time.perf_counter() - started
    windows = evaluation_windows(tokenizer, 512, options.windows)["wikitext2-test"]
    model.to(device)
    sites = {path: site for block in blocks for path, site in block.sites.items()}
    true = truths(model, measurement.kept, sites, windows.to(device))
    rows = []
    for (path, spec), (_, error, signal) in measurement.kept.items():
        estimate = measured.divergences[path][spec]
        guess = completed(
            {s: v for s, v in measured.divergences[path].items() if s in to_measure(forms[path])}, forms[path]
        )
        rows.append(
            {"path": path, "form": str(spec), "true": true[path, spec], "estimate": estimate, "error": error,
             "relative": error / signal, "completed": guess[spec]}
        )  # fmt: skip
    correlations, ratio = {}, {}
    for form in dict.fromkeys(row["form"] for row in rows):
        mine = [row for row in rows if row["form"] == form]
        true_values = [row["true"] for row in mine]
        correlations[form] = {
            name: round(spearmanr([row[name] for row in mine], true_values)[0], 3)
            for name in ("estimate", "error", "relative", "completed")
        }
        ratio[form] = round(sum(row["estimate"] for row in mine) / sum(true_values), 3)
    guessed = [row["completed"] / row["estimate"] for row in rows if row["completed"] != row["estimate"]]
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    result = {
        "model": Path(options.model).name, "device": card, "torch": torch.__version__, "weights": len(forms),
        "seconds": round(seconds, 1), "rank_correlation": correlations, "estimate_over_true": ratio,
        "completed_over_measured": [round(v, 3) for v in quantiles(guessed, n=4)] if len(guessed) > 1 else None, "rows": rows,
    }  # fmt: skip
    options.output.write_text(json.dumps(result, indent=1))
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1))


if __name__ == "__main__":
    main()
