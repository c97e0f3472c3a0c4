"""One token through a rotated 4-bit linear on a CPU, against bfloat16 `linear`.

    python benchmarks/bench_cpu.py [--threads 2] [--output benchmarks/results/kernels-cpu.json]

Milliseconds, median of many calls over as many copies of the weights as exceed 256 MB.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from pairquant.backends.ops import run
from pairquant.backends.table import BY_NAME
from pairquant.core.rotation import rotate_dense
from pairquant.kernels.run.cpu import CpuWeights

SHAPES = [(4096, 4096), (4096, 14336)]
TOKENS = (1, 4, 16, 128)
GROUP = 128


def measure(calls: list, seconds: float = 2.0) -> float:
    """Median milliseconds per call."""
    for call in calls[:2]:
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        calls[len(times) % len(calls)]()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def random_weights(channels: int, rows: int) -> CpuWeights:
    codes = torch.randint(0, 16, (rows, channels), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    grid = torch.rand(channels // GROUP, rows, 2).bfloat16()
    return CpuWeights(packed, grid, torch.linalg.qr(torch.randn(channels // GROUP, GROUP, GROUP))[0].contiguous())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kernels-cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = {
        "threads": options.threads, "machine": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {"torch": torch.__version__}, "unit": "ms", "rows": [],
    }  # fmt: skip
    for channels, rows in SHAPES:
        weights = [random_weights(channels, rows) for _ in range(2**28 // (channels * rows // 2) + 1)]
        dense = [torch.randn(rows, channels).bfloat16() for _ in range(2**28 // (channels * rows * 2) + 1)]
        for tokens in TOKENS:
            x = torch.randn(tokens, channels).bfloat16()
            row = {"in": channels, "out": rows, "tokens": tokens}
            row["bfloat16"] = measure([lambda w=w: torch.nn.functional.linear(x, w) for w in dense])
            ours = [w.tensors() for w in weights]
            backend = BY_NAME["cpu-int4"]
            row["pairquant"] = measure([lambda w=w: run(backend, x, w, None, [rows], GROUP) for w in ours])
            row["rotation"] = measure([lambda w=w: rotate_dense(x.float(), w.matrix).to(x.dtype) for w in weights])
            results["rows"].append(row)
            print("  ".join(f"{k} {v:g}" if isinstance(v, int) else f"{k} {v:.3f}" for k, v in row.items()), flush=True)
    options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
