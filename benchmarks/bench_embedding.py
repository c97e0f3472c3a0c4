"""What quantizing the input embedding alone costs, everything else in full precision.

python benchmarks/bench_embedding.py MODEL --output FILE [--cases bits:rotations …] [--group-size 64] [--windows 6]
    [--length 1024] [--device auto]
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from setting import numbers, opened

from pairquant.core.linear import decode
from pairquant.evaluation.quality import measure
from pairquant.models.sites import embedding_site
from pairquant.optimize.embedding import quantize_embedding
from pairquant.spec.linear import Spec
from pairquant.spec.options import QuantConfig
from pairquant.support.devices import resolve_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=["8:8", "6:8", "4:0", "4:8"])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = resolve_device(options.device)
    original, _, texts = opened(options.model, device, options.length)
    texts = {name: windows[: options.windows] for name, windows in texts.items()}
    model = copy.deepcopy(original)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # as --head-bits does
    site = embedding_site(model)
    assert site is not None, "the model has an input embedding that looks rows up"
    weight = site.weight.cpu().clone()
    rows = []
    for case in options.cases:
        bits, rotations = map(int, case.split(":"))
        layout = Spec(bits, options.group_size, rotations).layout(weight.shape[1], weight.shape[0])
        config = QuantConfig(bits=bits, group_size=options.group_size, rotations=rotations)
        packed, error = quantize_embedding(site.path, weight, layout, config, device)
        site.put(decode(packed).to(device))
        row = {
            "bits": bits, "rotations": rotations, "group_size": options.group_size, "relative_error": error,
            "megabytes": round(layout.stored_bits() / 8e6, 2), "in_16_bits": round(weight.numel() * 2 / 1e6, 2),
            **{name: numbers(measure(model, windows, original)) for name, windows in texts.items()},
            "model": Path(options.model).name, "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        }  # fmt: skip
        rows.append(row)
        print(case, round(error, 5), {name: round(row[name]["kl"], 5) for name in texts}, flush=True)
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
