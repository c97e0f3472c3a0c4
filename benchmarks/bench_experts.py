"""Time a block's experts on a GPU: microseconds of each part, by tiles and by number of tokens.

python benchmarks/bench_experts.py [--experts 128] [--hidden 2048] [--inner 768] [--chosen 8] [--tokens 1 8 32 64] [--tiles]
    [--activations int8]

Each time is the mean over a CUDA graph of `--blocks` blocks with weights of their own, so that nothing is found in the cache,
and with random routing. With --tiles every kind of tile is tried. With --activations what experts read is rounded first; the errors
then count that too, as they are from products of what was not rounded.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pairquant.kernels.run import launch, launch_experts, tune
from pairquant.kernels.run.expert_weights import ExpertWeights
from pairquant.kernels.run.launch_experts import ExpertTiles
from pairquant.spec.activations import FORMATS

CANDIDATES = [
    *(ExpertTiles(1, r, w, 4, prefetch=p) for r, w in ((16, 4), (32, 2), (32, 4), (64, 2)) for p in (0, 8)),
    *(ExpertTiles(t, r, w, 3) for t in (8, 16) for r, w in ((32, 2), (32, 4), (64, 2))),
    *(
        ExpertTiles(t, r, w, s, wide=True)
        for t in (16, 32, 64, 128)
        for r, w, s in ((64, 4, 4), (128, 4, 3), (128, 8, 3))
    ),
]


def random_experts(
    count: int, sizes: tuple[int, ...], channels: int, device: torch.device, activations: str = ""
) -> ExpertWeights:
    """Experts of random codes, groups of 128. activations: the format that they round their inputs to, "" for none."""
    one = tune.random_weights(sizes, channels, 128, device)
    words = torch.randint(-(2**31), 2**31 - 1, (count, *one.words.shape), dtype=torch.int32, device=device)
    grid = one.grid.expand(count, *one.grid.shape).contiguous()
    return ExpertWeights(replace(one, words=words.flatten(0, 1), grid=grid), count, activations=activations)


def timed(calls, repeats: int = 20) -> float:
    """Microseconds of one call, of a graph of them all."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1000 / repeats / len(calls)


def whole(
    x: Tensor, ids: Tensor, weights: Tensor, up: ExpertWeights, down: ExpertWeights, tiles: ExpertTiles
) -> Tensor:
    given = launch_experts.assign(ids, up.count, tiles)
    joined = launch_experts.product(x, up, given, ids.shape[1])
    y = launch_experts.product(joined, down, given, 1, "silu")
    return launch_experts.combine(y, weights, ids, up.count)


def error(x: Tensor, ids: Tensor, weights: Tensor, up: ExpertWeights, down: ExpertWeights, tiles: ExpertTiles) -> float:
    """Return the relative error of the first tokens against decoded weights in float32."""
    tokens, want = min(4, len(x)), []
    for t in range(tokens):
        y = 0
        for weight, e in zip(weights[t], ids[t].tolist(), strict=True):
            gate, second = F.linear(x[t].float(), dense(up, e)).chunk(2)
            y = y + weight * F.linear(F.silu(gate) * second, dense(down, e))
        want.append(y)
    found = whole(x, ids, weights, up, down, tiles)[:tokens].float()
    return float((found - torch.stack(want)).norm() / torch.stack(want).norm())


def dense(weights: ExpertWeights, expert: int) -> Tensor:
    rows = weights.layout.padded_rows // 16
    words = weights.each.words[expert * rows : (expert + 1) * rows]
    return launch.decode(replace(weights.each, words=words, grid=weights.each.grid[expert]), torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("experts", 128), ("hidden", 2048), ("inner", 768), ("chosen", 8), ("blocks", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--activations", choices=("", *FORMATS), default="")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda")
    blocks = [
        (
            random_experts(options.experts, (options.inner,) * 2, options.hidden, device, options.activations),
            random_experts(options.experts, (options.hidden,), options.inner, device, options.activations),
        )
        for _ in range(options.blocks)
    ]
    found = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "shape": vars(options) | {"output": None},
    }
    for tokens in options.tokens:
        x = torch.randn(tokens, options.hidden, device=device, dtype=torch.bfloat16)
        ids = [
            torch.rand(tokens, options.experts, device=device).topk(options.chosen).indices.to(torch.int32)
            for _ in blocks
        ]
        weights = torch.rand(tokens, options.chosen, device=device)
        chosen = launch_experts.choose(tokens * options.chosen, options.experts)
        rows = {}
        for tiles in CANDIDATES if options.tiles else [chosen]:
            if tiles.tokens == 1 and tokens > 32:
                continue
            mean = tokens * options.chosen / options.experts
            if tiles.tokens > 1 and (tiles.tokens > 16 * max(1, mean) or tiles.tokens * 16 < mean):
                continue
            given = [launch_experts.assign(i, options.experts, tiles) for i in ids]
            try:
                times = {
                    "whole": timed(
                        [lambda i=i, b=b: whole(x, i, weights, *b, tiles) for i, b in zip(ids, blocks, strict=True)]
                    ),
                    "up": timed(
                        [
                            lambda g=g, b=b: launch_experts.product(x, b[0], g, options.chosen)
                            for g, b in zip(given, blocks, strict=True)
                        ]
                    ),
                }
                inner = torch.randn(tokens * options.chosen, 2 * options.inner, device=device, dtype=torch.bfloat16)
                times["down"] = timed(
                    [
                        lambda g=g, b=b: launch_experts.product(inner, b[1], g, 1, "silu")
                        for g, b in zip(given, blocks, strict=True)
                    ]
                )
            except Exception as failure:
                print(tiles, type(failure).__name__, str(failure)[:80])
                continue
            off = error(x, ids[0], weights, *blocks[0], tiles)
            rows[str(tiles)] = {name: round(t, 1) for name, t in times.items()} | {"error": round(off, 5)}
        found[str(tokens)] = rows
        best = sorted(rows.items(), key=lambda row: row[1]["whole"])[:4]
        for part in ("up", "down"):
            print(tokens, part, *sorted(rows.items(), key=lambda row: row[1][part])[0])
        print(tokens, "chosen", chosen, rows.get(str(chosen)), flush=True)
        for name, times in best:
            print(f"  {times} {name}", flush=True)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
