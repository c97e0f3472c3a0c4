"""How well the sensitivities that plans are made from predict the divergence that single weights really cause.

python benchmarks/bench_sensitivity.py MODEL --output results.json [--every 7] [--bits 2 3 4] [--group-size 64]

For every Nth weight and each width, the weight alone is replaced by its quantized form, and the divergence of the whole
model's output is measured. It is compared, by rank correlation, with the estimate of `optimize.sensitivity`, with the
output error tr(E H Eᵀ), and with that error relative to the output.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from scipy.stats import spearmanr
from setting import CALIBRATION, evaluation_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from pairquant.core.rounding import proxy_terms
from pairquant.models.planning import plan_model
from pairquant.optimize.calibration import calibrate
from pairquant.optimize.sensitivity import Measurement
from pairquant.optimize.walk import InPlace
from pairquant.spec.linear import Spec
from pairquant.spec.options import QuantConfig
from pairquant.support.devices import resolve_device


class Recording(Measurement):
    """A measurement that also keeps each error and its size at the layer's own output."""

    def _errors(self, block, moments):
        found = super()._errors(block, moments)
        hessians = {path: m.hessian for m in moments for path in m.readers}
        for path, of in found.items():
            for spec, error in of.items():
                weight = block.sites[path].weight.float()
                terms = proxy_terms(weight, weight - error.float(), hessians[path])
                self.kept[path, spec.bits] = (error.cpu(), *terms.tolist())
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
    for (path, bits), (error, *_) in kept.items():
        weight = sites[path].weight.clone()
        sites[path].put(weight - error.to(weight.device, weight.dtype))
        found[path, bits] = divergence(model, windows, reference)
        sites[path].put(weight)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--every", type=int, default=7)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens for the true divergence")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = resolve_device(options.device)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = QuantConfig(group_size=options.group_size)
    plan, blocks = plan_model(model, config)
    forms = {
        path: [Spec(bits, options.group_size) for bits in options.bits]
        for i, path in enumerate(plan.layouts)
        if i % options.every == 0
    }
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
    for (path, bits), (_, error, signal) in measurement.kept.items():
        estimate = measured.divergences[path][Spec(bits, options.group_size)]
        rows.append(
            {"path": path, "bits": bits, "true": true[path, bits], "estimate": estimate, "error": error,
             "relative": error / signal}
        )  # fmt: skip
    correlations = {
        str(bits): {
            name: spearmanr(
                [r[name] for r in rows if r["bits"] == bits], [r["true"] for r in rows if r["bits"] == bits]
            )[0]
            for name in ("estimate", "error", "relative")
        }
        for bits in options.bits
    }
    ratio = {
        str(b): sum(r["estimate"] for r in rows if r["bits"] == b) / sum(r["true"] for r in rows if r["bits"] == b)
        for b in options.bits
    }
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    result = {
        "model": Path(options.model).name, "device": card, "torch": torch.__version__, "weights": len(forms),
        "seconds": round(seconds, 1), "rank_correlation": correlations, "estimate_over_true": ratio, "rows": rows,
    }  # fmt: skip
    options.output.write_text(json.dumps(result, indent=1))
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1))


if __name__ == "__main__":
    main()
