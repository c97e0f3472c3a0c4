"""Rotated linears of every width on one NVIDIA GPU, against fp16: microseconds per call, rotation included.

    python benchmarks/bench_widths.py [--bits 4] [--mxfp4] [--output benchmarks/results/widths.json]

Measured as in bench_kernels.py. Tiles come from the table that was measured at 4 bits. "error": of the result against the
decoded weights in float32, relative; for fp16 weights it would be about 3e-4.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from bench_kernels import DEVICE, GROUP, copies, measure, rotated

from pairquant.kernels.run import launch
from pairquant.kernels.run.layout import KernelLayout
from pairquant.kernels.run.tune import random_weights
from pairquant.kernels.run.weights import KernelWeights
from pairquant.spec.mx import MX_BLOCK

SHAPES = [((14336,), 4096), ((4096, 1024, 1024), 4096), ((4096,), 14336)]
TOKENS = (1, 8, 32, 256, 2048)
WIDTHS = (2, 3, 4, 5, 6, 8)
MX = "mxfp4"


def floats(sizes: tuple[int, ...], channels: int) -> KernelWeights:
    """Random weights in MXFP4."""
    weights, layout = random_weights(sizes, channels, GROUP, DEVICE), KernelLayout(channels, sizes, MX_BLOCK)
    return replace(weights, grid=2.0 ** torch.randint(-9, -6, (layout.grid_rows, layout.padded_rows), device=DEVICE))


def bench(sizes: tuple[int, ...], channels: int, kind: str) -> dict[str, Any]:
    """Tokens → microseconds, and the error at each. kind: "4 bits", or "mxfp4"."""
    bits = 4 if kind == MX else int(kind.split()[0])
    weights = copies(
        lambda: floats(sizes, channels) if kind == MX else random_weights(sizes, channels, GROUP, DEVICE, bits=bits),
        sum(sizes) * channels * bits // 8,
    )
    decoded = launch.decode(weights[0], torch.float32)
    found: dict[str, Any] = {"us": {}, "error": {}}
    for tokens in TOKENS:
        x = torch.randn(tokens, channels, dtype=torch.half, device=DEVICE)
        y, want = rotated(x, weights[0]).float(), x.float() @ decoded.T
        found["error"][tokens] = f"{(y - want).norm() / want.norm():.1e}"
        found["us"][tokens] = round(
            measure([lambda w=w: rotated(x, w) for w in weights], 48 if tokens <= 256 else 12), 2
        )
    return found


def dense(sizes: tuple[int, ...], channels: int) -> dict[int, float]:
    rows = sum(sizes)
    weights = copies(lambda: torch.randn(rows, channels, dtype=torch.half, device=DEVICE), rows * channels * 2)
    found = {}
    for tokens in TOKENS:
        x = torch.randn(tokens, channels, dtype=torch.half, device=DEVICE)
        calls = [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]
        found[tokens] = round(measure(calls, 48 if tokens <= 256 else 12), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--mxfp4", action="store_true", help="also weights in MXFP4")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
    }
    for sizes, channels in SHAPES:
        name = f"{channels} → {' + '.join(map(str, sizes))}"
        results[name] = {"fp16": dense(sizes, channels)}
        for kind in [*(f"{bits} bits" for bits in options.bits), *([MX] if options.mxfp4 else [])]:
            results[name][kind] = bench(sizes, channels, kind)
            print(name, kind, results[name][kind], flush=True)
        if options.output:
            options.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
