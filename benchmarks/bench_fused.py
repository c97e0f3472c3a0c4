"""Residual + RMSNorm and SiLU · up, computed with the rotation of the linear that follows or by kernels of their own, on a GPU.

    python benchmarks/bench_fused.py [--models LLaMA-3-8B] [--output benchmarks/results/fused-h100.json]

For the q/k/v, gate/up and down projections of one decoder block, bf16, rotations shared: microseconds of everything from the
residual, or from gate and up, to the projection's output. "apart": torch.compile makes one kernel of the norm, or of SiLU · up,
then rotation and product as `bench_kernels.py` measures them; "fused": `launch_norm`. CUDA graphs over as many copies of the weights
as exceed twice the L2 cache, replayed in turn, so that both meet the same clocks; the median of several replays.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from bench_kernels import DEVICE, GROUP, MODELS, ROTATIONS, copies, save

from pairquant.kernels.availability import device_class
from pairquant.kernels.run import launch, launch_norm
from pairquant.kernels.run.norm import Norm
from pairquant.kernels.run.table import choose
from pairquant.kernels.run.tune import random_weights

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
EPS = 1e-5
DTYPE = torch.bfloat16


@torch.compile(dynamic=False)
def add_norm(x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What vLLM's RMSNorm compiles to."""
    h = x.float() + residual.float()
    normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)
    return normed.to(x.dtype) * norm, h.to(x.dtype)


@torch.compile(dynamic=False)
def silu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def after_norm(tokens: int, sizes: tuple[int, ...], channels: int, weights: list[Any]) -> dict[str, Callable]:
    """Method → a call with the weights."""
    x, residual = torch.randn(2, tokens, channels, device=DEVICE).to(DTYPE)
    norm = torch.rand(channels, device=DEVICE).to(DTYPE)
    tile = choose(device_class(DEVICE), sum(sizes), channels, tokens)
    agree(
        launch.linear(add_norm(x, residual, norm)[0], weights[0], None, tile),
        launch_norm.norm_linear(x, residual, Norm(norm, EPS), weights[0], None, tile)[0],
    )
    return {
        "apart": lambda w: launch.linear(add_norm(x, residual, norm)[0], w, None, tile),
        "fused": lambda w: launch_norm.norm_linear(x, residual, Norm(norm, EPS), w, None, tile),
    }


def after_silu(tokens: int, sizes: tuple[int, ...], channels: int, weights: list[Any]) -> dict[str, Callable]:
    """As `after_norm`."""
    x = torch.randn(tokens, 2 * channels, device=DEVICE).to(DTYPE)
    tile = choose(device_class(DEVICE), sum(sizes), channels, tokens)
    agree(launch.linear(silu(x), weights[0], None, tile), launch_norm.silu_linear(x, weights[0], None, tile))
    return {
        "apart": lambda w: launch.linear(silu(x), w, None, tile),
        "fused": lambda w: launch_norm.silu_linear(x, w, None, tile),
    }


def agree(apart: torch.Tensor, fused: torch.Tensor) -> None:
    """Stop if the two differ by more than what bfloat16 rounds."""
    error = float((apart.float() - fused.float()).norm() / apart.float().norm())
    if not error < 0.01:
        raise SystemExit(f"the fused kernels differ by {error:.4f}")


def in_turn(methods: dict[str, list[Callable[[], Any]]], at_least: int, replays: int = 15) -> dict[str, float]:
    """Method → median microseconds per call, the graphs of all methods replayed one after the other each time."""
    graphs, times = {}, {method: [] for method in methods}
    for method, calls in methods.items():
        for call in calls[:2]:
            call()
        sequence = [calls[i % len(calls)] for i in range(max(at_least, len(calls)))]
        torch.cuda.synchronize()
        graphs[method] = torch.cuda.CUDAGraph(), len(sequence)
        with torch.cuda.graph(graphs[method][0]):
            for call in sequence:
                call()
    for turn in range(replays + 2):
        for method, (graph, number) in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 2:
                times[method].append(start.elapsed_time(end) * 1e3 / number)
    return {method: statistics.median(found) for method, found in times.items()}


def bench(model: str) -> dict[int, dict[str, float]]:
    """Tokens → "linear, method" → microseconds."""
    qkv, _, gate_up, down = MODELS[model]
    table: dict[int, dict[str, float]] = {tokens: {} for tokens in TOKENS}
    linears = {"qkv": (qkv, after_norm), "gate_up": (gate_up, after_norm), "down": (down, after_silu)}
    for name, ((sizes, channels), before) in linears.items():
        bytes_each = sum(sizes) * channels // 2
        weights = copies(lambda s=sizes, c=channels: random_weights(s, c, GROUP, DEVICE, ROTATIONS), bytes_each)
        for tokens in TOKENS:
            methods = before(tokens, sizes, channels, weights)
            calls = {m: [lambda w=w, c=call: c(w) for w in weights] for m, call in methods.items()}
            row = in_turn(calls, 48 if tokens <= 256 else 12)
            table[tokens] |= {f"{name}, {method}": round(us, 2) for method, us in row.items()}
    for row in table.values():
        for method in ("apart", "fused"):
            row[f"sum, {method}"] = round(sum(row[f"{name}, {method}"] for name in linears), 2)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/fused-h100.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "versions": versions, "unit": "us", "blocks": {}}
    for model in options.models:
        results["blocks"][model] = bench(model)
        print(model)
        for tokens, row in results["blocks"][model].items():
            print(f"  {tokens:5} " + json.dumps(row), flush=True)
        save(results, options.output)


if __name__ == "__main__":
    main()
