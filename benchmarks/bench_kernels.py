"""Rotated 4-bit linears against fp16 and against AWQ's kernel, on one NVIDIA GPU.

    python benchmarks/bench_kernels.py [--peers .peers] [--output benchmarks/results/kernels.json]

For the linears of one decoder block of three models, rotation included, microseconds per call: CUDA graphs of at least
48 calls over as many copies of the weights as exceed twice the L2 cache, median of several replays. AWQ-Marlin merges
q/k/v and gate/up as vLLM does; "original" is one rotation (the original's kernel) and one Marlin product per projection.
Without the peers' sources (see kernel_peers.py) only fp16 and our own are measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from pairquant.kernels.availability import device_class
from pairquant.kernels.run import launch
from pairquant.kernels.run.table import Narrow, Wide, choose
from pairquant.kernels.run.tune import random_weights
from pairquant.kernels.run.weights import KernelWeights

MODELS = {
    "LLaMA-3-8B": [((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336)],
    "Qwen3-4B": [((4096, 1024, 1024), 2560), ((2560,), 4096), ((9728, 9728), 2560), ((2560,), 9728)],
    "Qwen3-1.7B": [((2048, 1024, 1024), 2048), ((2048,), 2048), ((6144, 6144), 2048), ((2048,), 6144)],
}
TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 2048)
GROUP, ROTATIONS = 128, 8
DEVICE = torch.device("cuda")


def measure(calls: list[Callable[[], Any]], at_least: int = 48, replays: int = 9) -> float:
    """Median microseconds per call."""
    for call in calls[:2]:
        call()
    sequence = [calls[i % len(calls)] for i in range(max(at_least, len(calls)))]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in sequence:
            call()
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(sequence))
    return statistics.median(times)


def copies(make: Callable[[], Any], size: int) -> list[Any]:
    """As many as exceed twice the L2 cache."""
    l2 = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return [make() for _ in range(2 * l2 // size + 2)]


def rotated(x: torch.Tensor, weights: KernelWeights, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What the operator does once its arguments are checked."""
    tile = choose(device_class(DEVICE), sum(weights.out_features), x.shape[1], x.shape[0])
    return launch.linear(x, weights, bias, tile)


def bench_shape(sizes: tuple[int, ...], channels: int, peers: Any) -> dict[int, dict[str, float]]:
    """Tokens → method → microseconds."""
    rows = sum(sizes)
    shared = copies(lambda: random_weights(sizes, channels, GROUP, DEVICE, ROTATIONS), rows * channels // 2)
    unshared = copies(
        lambda: random_weights(sizes, channels, GROUP, DEVICE, ROTATIONS, len(sizes)), rows * channels // 2
    )
    dense = copies(lambda: torch.randn(rows, channels, dtype=torch.half, device=DEVICE), rows * channels * 2)
    marlin, original = [], []
    if peers:
        marlin = copies(lambda: random_marlin(peers, rows, channels), rows * channels // 2)[:24]
        for _ in range(min(len(marlin), 12)):
            parts = [(random_rotation(peers, channels), random_marlin(peers, n, channels)) for n in sizes]
            original.append(parts)
    result = {}
    for tokens in TOKENS:
        x = torch.randn(tokens, channels, dtype=torch.half, device=DEVICE)
        few = 48 if tokens <= 256 else 12
        row = {
            "fp16": measure([lambda w=w: torch.nn.functional.linear(x, w) for w in dense], few),
            "pairquant": measure([lambda w=w: rotated(x, w) for w in shared], few),
            "pairquant, unshared": measure([lambda w=w: rotated(x, w) for w in unshared], few),
        }
        if peers:
            row["AWQ-Marlin"] = measure([lambda m=m: m(x) for m in marlin], few)
            joined = [lambda p=p: torch.cat([product(rotate(x)) for rotate, product in p], dim=-1) for p in original]
            row["original"] = measure(joined, few)
        result[tokens] = row
    return result


def random_marlin(peers: Any, rows: int, channels: int) -> Any:
    groups = channels // GROUP
    codes = torch.randint(0, 16, (rows, channels), dtype=torch.uint8, device=DEVICE)
    zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8, device=DEVICE)
    return peers.MarlinLinear(codes, zeros, torch.rand(rows, groups, device=DEVICE).mul_(0.01).half())


def random_rotation(peers: Any, channels: int) -> Any:
    pairs = torch.stack(
        [torch.cat([torch.randperm(GROUP) for _ in range(channels // GROUP)]) for _ in range(ROTATIONS)]
    )
    theta = torch.randn(ROTATIONS, channels // 2, device=DEVICE).half()
    scales = (torch.rand(1, channels, device=DEVICE) + 0.5).half()
    return peers.OriginalRotation(theta, pairs.to(torch.int16).to(DEVICE), scales, GROUP)


def bench_rotation(peers: Any) -> list[dict[str, float]]:
    """The rotation before a product, the original's kernel, the fast Hadamard transform and a copy, warm in L2 as each would find x."""
    rows = []
    for channels in (2048, 4096, 8192, 14336, 16384):
        weights = random_weights((128,), channels, GROUP, DEVICE, ROTATIONS)
        original = random_rotation(peers, channels) if peers else None
        for tokens in (1, 4, 16, 64, 256, 1024, 4096):
            x = torch.randn(tokens, channels, dtype=torch.half, device=DEVICE)
            y = torch.empty_like(x)
            before = Narrow(32, 2) if tokens <= 8 else Wide(64, 64, 4)  # what the product that follows would be
            rotated = measure([lambda: launch.rotate_for(before, x, weights)])
            row = {"channels": channels, "tokens": tokens, "rotate": rotated}
            row["copy"] = measure([lambda: y.copy_(x)])
            if peers:
                row["original"] = measure([lambda: original(x)])
                row["hadamard"] = measure([lambda: peers.hadamard(x)])
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder of the peers' sources (see kernel_peers.py)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kernels.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    peers = None
    if options.peers:
        import kernel_peers as peers

        for load in (peers.load_marlin, peers.load_rotation, peers.load_hadamard):
            load(options.peers)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "versions": versions, "unit": "us", "blocks": {}}
    for model, shapes in MODELS.items():
        by_shape = {f"{sum(sizes)}x{channels}": bench_shape(sizes, channels, peers) for sizes, channels in shapes}
        methods = next(iter(by_shape.values()))[1]
        total = {t: {m: round(sum(s[t][m] for s in by_shape.values()), 2) for m in methods} for t in TOKENS}
        results["blocks"][model] = {"total": total, "shapes": by_shape}
        print(
            model, *(f"  {t:5} " + "  ".join(f"{m} {us:8.1f}" for m, us in total[t].items()) for t in TOKENS), sep="\n"
        )
        save(results, options.output)
    results["rotate"] = bench_rotation(peers)
    for row in results["rotate"]:
        print("  ".join(f"{k} {v:g}" if isinstance(v, int) else f"{k} {v:.2f}" for k, v in row.items()))
    save(results, options.output)


def save(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
