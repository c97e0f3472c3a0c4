"""Rotated 4-bit linears on a CPU against bfloat16 `linear`; with two models, whole forward passes of both.

    python benchmarks/bench_cpu.py [--threads 1] [--shapes small large] [--models PACKED PLAIN]
        [--output benchmarks/results/kernels-cpu.json]

Whatever is compared alternates call by call in one process, so that a slower minute hits all. The first tenth of the sorted
times is given (`--quantile`), because what else runs on a shared machine only adds time. Linears: microseconds, over as many
copies of the weights as exceed 128 MB. Models: milliseconds of a prompt of 512 tokens, and of one more token for each of a batch of
sequences that are 32 tokens long.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

from pairquant.backends.ops import run
from pairquant.backends.table import BY_NAME
from pairquant.kernels.run import cpu, cpu_int8

SHAPES = {  # in, out, group
    "small": [(576, 960, 64), (576, 576, 64), (576, 3072, 64), (1536, 576, 64)],  # SmolLM2-135M, transforms shared
    "large": [(4096, 4096, 128), (4096, 14336, 128), (14336, 4096, 128)],
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
BATCHES = (1, 8, 32)
PROMPT, CONTEXT = 512, 32
BACKEND, INT8 = BY_NAME["cpu-int4"], BY_NAME["cpu-int8"]


def alternate(calls: dict[str, Callable[[int], object]], seconds: float, quantile: float) -> dict[str, float]:
    """Seconds of each call, which is given the number of its turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call(turn)
            times[name].append(time.perf_counter() - start)
        turn += 1
    return {name: sorted(found)[int(len(found) * quantile)] for name, found in times.items()}


def random_weights(channels: int, rows: int, group: int) -> list[torch.Tensor]:
    """What the backend prepares, of random codes."""
    codes = torch.randint(0, 16, (rows, channels), dtype=torch.uint8)
    scales, zeros = torch.rand(channels // group, rows), torch.full((channels // group, rows), 8.0)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    stored = cpu._rows(codes, scales, zeros) if cpu.multiplies_bfloat16() else codes.new_empty(0, group // 2 + 4)
    matrix = torch.linalg.qr(torch.randn(1, channels // group, group, group))[0].contiguous()
    codes = cpu.CpuCodes(packed, cpu._grid(scales, zeros), stored, torch.empty(0, channels).bfloat16())
    return cpu.CpuWeights(matrix, (codes,)).tensors()


def with_numbers(tensors: list[torch.Tensor], channels: int, rows: int) -> list[torch.Tensor]:
    """The same weights as the backend for int8 activations prepares them, with random numbers of 8 bits."""
    numbers = torch.randint(-127, 128, (channels, rows), dtype=torch.int8)
    return [*tensors, numbers, torch.rand(rows), torch.tensor(True)]


def linears(shape: tuple[int, int, int], seconds: float, quantile: float) -> list[dict[str, float]]:
    """A row for each number of tokens."""
    channels, rows, group = shape
    copies = 2**27 // (channels * rows * 2) + 2
    ours = [random_weights(channels, rows, group) for _ in range(copies)]
    dense = [torch.randn(rows, channels).bfloat16() for _ in range(copies)]
    whole = [with_numbers(tensors, channels, rows) for tensors in ours] if cpu_int8.products_are_exact() else []
    found = []
    for tokens in TOKENS:
        x = torch.randn(tokens, channels).bfloat16()
        calls: dict[str, Callable[[int], object]] = {
            "bfloat16": lambda i, x=x: F.linear(x, dense[i % copies]),
            "pairquant": lambda i, x=x: run(BACKEND, x, ours[i % copies], None, [rows], group),
            "rotation": lambda i, x=x: cpu.rotated(x, ours[i % copies][0]),
            "int4": lambda i, x=x: cpu.int4_product(x, *ours[(i + 1) % copies][1:3], group),
        }
        if cpu.multiplies_bfloat16():
            calls["decoded"] = lambda i, x=x: cpu.decoded_product(x, ours[(i + 1) % copies][3], rows)
        if whole:
            calls["int8 activations"] = lambda i, x=x: run(INT8, x, whole[i % copies], None, [rows], group, "int8")
        micro = {name: value * 1e6 for name, value in alternate(calls, seconds, quantile).items()}
        found.append({"in": channels, "out": rows, "group": group, "tokens": tokens} | _rounded(micro))
        found[-1]["ratio"] = round(micro["pairquant"] / micro["bfloat16"], 2)
        print("  ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
    return found


def models(paths: list[str], seconds: float, quantile: float) -> list[dict[str, object]]:
    """Forward passes of the packed model and the plain one, in turn."""
    import transformers

    import pairquant  # noqa: F401

    both = {
        name: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        for name, path in zip(("packed", "plain"), paths, strict=True)
    }
    vocabulary = next(iter(both.values())).config.vocab_size

    def prompt(model):
        tokens = torch.randint(0, vocabulary, (1, PROMPT))
        return lambda turn: model(tokens, logits_to_keep=1)

    def decode(model, batch):
        first = model(torch.randint(0, vocabulary, (batch, CONTEXT)), use_cache=True, logits_to_keep=1)
        token, cache = first.logits.argmax(-1), first.past_key_values

        def step(turn):
            model(token, past_key_values=cache, use_cache=True)
            cache.crop(CONTEXT)

        return step

    rows: list[dict[str, object]] = []
    cases = [("prompt", 1, lambda m: prompt(m)), *(("decode", b, lambda m, b=b: decode(m, b)) for b in BATCHES)]
    for what, batch, make in cases:
        found = alternate({name: make(model) for name, model in both.items()}, 4 * seconds, quantile)
        milli = {name: value * 1e3 for name, value in found.items()}
        row: dict[str, object] = {"what": what, "batch": batch, **_rounded(milli)}
        row["ratio"] = round(milli["packed"] / milli["plain"], 2)
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return rows


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 1) for name, value in values.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--models", nargs=2, metavar=("PACKED", "PLAIN"))
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each row")
    parser.add_argument("--quantile", type=float, default=0.1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kernels-cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cpus = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    results: dict[str, object] = {
        "threads": options.threads, "device": f"{platform.machine()} CPU, {cpus[0] if cpus else 'unknown'}",
        "capability": torch.backends.cpu.get_cpu_capability(), "multiplies_bfloat16": cpu.multiplies_bfloat16(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "quantile": options.quantile, "unit": "us of linears, ms of models",
    }  # fmt: skip
    results["rows"] = [
        row
        for name in options.shapes
        for shape in SHAPES[name]
        for row in linears(shape, options.seconds, options.quantile)
    ]
    if options.models:
        results["models"] = models(options.models, options.seconds, options.quantile)
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
