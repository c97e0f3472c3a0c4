"""What calibrating on text that the model samples itself buys: on that text, and on others.

    python benchmarks/bench_own_text.py MODEL --output FILE [--preset quick] [--samples 16] [--seq-len 512] [--windows 4]
        [--own-windows 8] [--device auto]

The model is quantized on the project's calibration text (setting.py), on as many windows of its own, and on half of each. It is
measured on the usual texts and on windows of its own that were drawn from another seed. One JSON line a text.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from setting import SETTING, calibration_tokens, numbers, opened

from pairquant.checkpoint.read import ModelFiles
from pairquant.evaluation.quality import measure
from pairquant.jobs.own_text import OwnText
from pairquant.models.planning import plan_model
from pairquant.optimize.walk import Walk
from pairquant.spec.options import QuantConfig
from pairquant.support.devices import resolve_device
from pairquant.support.windows import window_prefix


class Printed:
    def stage(self, text: str) -> None: ...

    def notice(self, text: str) -> None:
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--own-windows", type=int, default=8)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device, files = resolve_device(options.device), ModelFiles.find(options.model)
    original, tokenizer, texts = opened(options.model, device)
    texts = {name: windows[: options.windows] for name, windows in texts.items()}
    setting = SETTING | {"samples": options.samples, "seq_len": options.seq_len}
    config = QuantConfig(preset=options.preset, **setting)

    def own(seed: int, count: int) -> torch.Tensor:
        parameters = sum(p.numel() for p in original.parameters())
        prefix = window_prefix(tokenizer)
        return OwnText(files, parameters, tokenizer, options.seq_len, seed, prefix, device, Printed()).windows(count)

    usual, mine = calibration_tokens(tokenizer, config), own(0, options.samples)
    texts["self"] = own(1, options.own_windows)
    half = options.samples // 2
    for name, tokens in (("usual", usual), ("self", mine), ("both", torch.cat([usual[:half], mine[:half]]))):
        model, start = copy.deepcopy(original), time.perf_counter()
        plan, blocks = plan_model(model, config)
        for _ in Walk(model, blocks, plan, config, device, tokens).run():
            pass
        row = {
            "calibration": name, "preset": options.preset, "samples": options.samples, "seq_len": options.seq_len,
            "seconds": round(time.perf_counter() - start, 1),
            **{text: numbers(measure(model, windows, original)) for text, windows in texts.items()},
            "model": Path(options.model).name, "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        }  # fmt: skip
        print(name, {text: round(row[text]["kl"], 4) for text in texts}, row["seconds"], flush=True)
        with options.output.open("a") as out:
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
