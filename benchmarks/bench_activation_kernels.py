"""Linears whose activations are rounded to 8 bits (W4A8) against bf16 and against 16-bit activations (W4A16), on one Hopper GPU.

    python benchmarks/bench_activation_kernels.py [--output benchmarks/results/activation-kernels.json] [--tokens 512 2048]

First every kernel is compared with the reference on this GPU. Then, for the linears of one block of an 8B model, microseconds
per call, measured as in bench_kernels.py. "round" is rotation and rounding; the names with a number of rows are products alone,
of what was rounded before, those of `RowBytes` with the decoding of the weight. The last line for each number of tokens adds
the two, relative to bf16, for the tiles of the table (`table.choose_rounded`) and for the fastest.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from bench_kernels import DEVICE, GROUP, ROTATIONS, copies, measure, rotated

from pairquant.core.linear import rotated_weight
from pairquant.kernels.availability import device_class
from pairquant.kernels.run import launch
from pairquant.kernels.run import launch_rounded as rounded
from pairquant.kernels.run.table import Bytes, RowBytes, WholeBytes, Wide, choose_rounded
from pairquant.kernels.run.tune import random_weights
from pairquant.kernels.run.weights import KernelWeights
from pairquant.spec.linear import PackedLinear, Spec

SHAPES = [((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336)]
TOKENS = (512, 2048, 8192, 64, 256, 128, 16)  # what matters most first, as time may run out
FORMATS = ("fp8", "int8")
#: Tiles to try for up to so many tokens.
TILES = {
    16: [Bytes(64, 16, 4), Bytes(64, 16, 4, 4, 3)],
    64: [Bytes(64, 64, 4), Bytes(64, 64, 4, 4, 3)],
    128: [Bytes(64, 128, 4), Bytes(128, 128, 8, 4, 1)],
    512: [Bytes(64, 128, 4), Bytes(128, 128, 8, 4, 1), WholeBytes(), RowBytes(), RowBytes(tokens=128)],
    8192: [WholeBytes(), RowBytes(), RowBytes(step=4096)],
}  # fmt: skip
SECONDS = 120
#: (out_features of each linear, in_features, group size, rotations), and tokens, for which kernels are compared with the reference.
CHECKED = [((512,), 1024, 128, 8), ((256, 136, 24), 576, 64, 3), ((1000,), 1184, 32, 2), ((8, 1032), 1536, 128, 1)]
CHECKED_TOKENS = (1, 17, 130, 300)
CHECKED_TILES = (Bytes(64, 64, 4), WholeBytes(), RowBytes())


def reference_codes(x_rot: torch.Tensor, activations: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes as float32 and scales [M, 1]."""
    if activations == "int8":
        scale = (x_rot.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
        return (x_rot / scale).round().clamp(-127, 127), scale
    scale = (x_rot.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-30)
    return (x_rot / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float(), scale


def reference_weights(weights: KernelWeights, group: int) -> list[torch.Tensor]:
    """The rotated weight of each linear, float32 [N, C], from what is stored."""
    found = []
    for index, rows in enumerate(weights.out_features):
        layout = Spec(weights.bits, group, weights.rotation.rotations).layout(weights.rotation.channels, rows)
        found.append(rotated_weight(PackedLinear(layout, weights.stored(index, layout))))
    return found


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def check() -> dict[str, Any]:
    """Compare all kernels with the reference on awkward shapes: the largest relative error of each."""
    worst: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        worst[name] = max(worst.get(name, 0.0), value if value == value else float("inf"))

    for sizes, channels, group, rotations in CHECKED:
        plain = random_weights(sizes, channels, group, DEVICE, rotations, len(sizes))
        rotation, matrices = plain.rotation, reference_weights(plain, group)
        blocks = plain.layout.k_blocks
        dense = launch.rotation_blocks(rotation, blocks * 128, torch.float32, mma_order=False)
        for tokens in CHECKED_TOKENS:
            x = torch.randn(tokens, channels, device=DEVICE, dtype=torch.bfloat16)
            x[tokens // 2] *= 1000
            padded = torch.nn.functional.pad(x.float(), (0, blocks * 128 - channels)).view(tokens, blocks, 1, 128)
            for activations in FORMATS:
                weights = rounded.with_row_scales(plain, activations)
                found = rounded.codes(x, rotation, activations)
                results = []
                for t, matrix in enumerate(dense):
                    by_block = matrix.view(128, blocks, 128).transpose(0, 1).double()
                    x_rot = (padded.double() @ by_block).view(tokens, -1)[:, :channels].float()
                    want, scale = reference_codes(x_rot, activations)
                    got = found.codes[t].float()
                    note(f"{activations} codes that differ", float((got[:, :channels] != want).float().mean()))
                    note(f"{activations} scales", float((found.scales[t] / scale[:, 0] - 1).abs().max()))
                    note(f"{activations} padding", float(got[:, channels:].abs().sum()))
                    results.append((got[:, :channels] * found.scales[t][:, None]).double() @ matrices[t].double().T)
                want = torch.cat(results, dim=1)
                for tile in CHECKED_TILES:
                    got = rounded.product(found, weights, None, tile, torch.float32)
                    note(f"{activations} {name_of(tile)}", distance(got, want))
                values = rounded.values(x, rotation, activations, mma_order=True)
                note(f"{activations} values", distance(launch.product(values, weights, None, Wide(64, 32, 4, 2)), want))
            assert not plain.arrivals.any(), "the counters must be back at zero"
    for name, value in worst.items():
        print(f"{name:40} {value:.2e}")
    return worst


def name_of(tile: Bytes | WholeBytes | RowBytes) -> str:
    return f"{type(tile).__name__} {' '.join(str(value) for value in asdict(tile).values())}"


class Row:
    """The times of one shape at one number of tokens; a failure is noted as such, and does not end the run."""

    def __init__(self, few: int):
        self.few, self.times = few, {}

    def add(self, name: str, calls: list[Callable[[], Any]]) -> None:
        try:
            self.times[name] = round(measure(calls, self.few, 5), 2)
        except Exception as error:
            self.times[name] = f"{type(error).__name__}: {error}"[:200]
            torch.cuda.synchronize()


def weights_of(
    sizes: tuple[int, ...], channels: int, group: int, rotations: int, activations: str, transforms: int = 1
) -> KernelWeights:
    return rounded.with_row_scales(random_weights(sizes, channels, group, DEVICE, rotations, transforms), activations)


class Weights:
    """The weights of one shape, as often as they exceed the L2 cache: dense, and packed for each format."""

    def __init__(self, sizes: tuple[int, ...], channels: int):
        self.rows, self.channels, size = sum(sizes), channels, sum(sizes) * channels
        self.dense = copies(lambda: torch.randn(self.rows, channels, dtype=torch.bfloat16, device=DEVICE), size * 2)
        self.packed = {
            name: copies(lambda name=name: weights_of(sizes, channels, GROUP, ROTATIONS, name), size // 2)
            for name in FORMATS
        }

    def times(self, tokens: int) -> dict[str, Any]:
        """Method → microseconds."""
        row = Row(24 if tokens <= 512 else 4)
        x = torch.randn(tokens, self.channels, dtype=torch.bfloat16, device=DEVICE)
        row.add("bf16", [lambda w=w: torch.nn.functional.linear(x, w) for w in self.dense])
        row.add("W4A16", [lambda w=w: rotated(x, w) for w in self.packed[FORMATS[0]]])
        for activations in FORMATS:
            bench_format(row, x, self.packed[activations], activations)
        print(self.rows, self.channels, tokens, row.times, flush=True)
        return row.times


def bench_format(row: Row, x: torch.Tensor, packed: list[KernelWeights], activations: str) -> None:
    tokens, first = len(x), packed[0]
    found = rounded.codes(x, first.rotation, activations)
    row.add(f"{activations} round", [lambda: rounded.codes(x, first.rotation, activations)])
    if tokens <= 64:
        row.add(f"{activations} values", [lambda: rounded.values(x, first.rotation, activations, mma_order=True)])
    chosen = choose_rounded(device_class(DEVICE), sum(first.out_features), x.shape[1], tokens, activations, 4)
    tiles = next(tiles for most, tiles in TILES.items() if tokens <= most)
    for tile in dict.fromkeys([chosen, *tiles]):
        calls = [lambda w=w: rounded.product(found, w, None, tile, x.dtype) for w in packed]
        row.add(f"{activations} {name_of(tile)}", calls)
    row.times[f"{activations} chosen"] = row.times[f"{activations} {name_of(chosen)}"]


#: Methods that the summary needs.
NEEDED = ("bf16", "W4A16", *(f"{name} {what}" for name in FORMATS for what in ("round", "chosen")))


def summarize(tokens: int, rows: list[dict[str, Any]]) -> None:
    """Print the whole block, with rotation and rounding, relative to bf16."""
    bf16 = sum(row["bf16"] for row in rows)
    line = f"{tokens:5} bf16 {bf16:8.1f}  W4A16 {sum(row['W4A16'] for row in rows) / bf16:5.2f}"
    for activations in FORMATS:
        rotation = sum(row[f"{activations} round"] for row in rows)
        chosen = sum(row[f"{activations} chosen"] for row in rows)
        fastest = sum(min(us for name, us in row.items() if is_product(name, us, activations)) for row in rows)
        line += f"  {activations} round {rotation / bf16:.2f}"
        line += f" with products chosen {(rotation + chosen) / bf16:.2f}, fastest {(rotation + fastest) / bf16:.2f}"
    print(line, flush=True)


def is_product(name: str, us: Any, activations: str) -> bool:
    return name.startswith(activations) and "Bytes" in name and isinstance(us, float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/activation-kernels.json"))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="no number of tokens is begun after so many seconds"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    end = time.time() + options.seconds
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "versions": versions, "unit": "us"}
    results["largest relative error"] = check()
    results["tokens"] = {}
    weights = [Weights(sizes, channels) for sizes, channels in SHAPES]
    for tokens in options.tokens:
        if time.time() > end:
            print(f"out of time before {tokens} tokens")
            break
        rows = {f"{w.rows}x{w.channels}": w.times(tokens) for w in weights}
        results["tokens"][tokens] = rows
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1))
        if all(isinstance(row.get(name), float) for row in rows.values() for name in NEEDED):
            summarize(tokens, list(rows.values()))


if __name__ == "__main__":
    main()
