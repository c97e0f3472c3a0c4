"""The output embedding of a model on a GPU: microseconds of one call, on the GPU and on the host.

    python benchmarks/bench_head_kernels.py [--shapes 128256x4096 151936x2048] [--bits 4 6 8] [--tokens 1 8 32] [--output FILE]

vLLM runs the output embedding outside its CUDA graphs, so that a call's time on the host counts as well. Rows: the bfloat16
weight; our kernels launched one by one; our kernels by a CUDA graph, as in vLLM.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from pairquant.backends.ops import run
from pairquant.backends.table import BY_NAME, prepare_all
from pairquant.kernels.run.replay import Replayed
from pairquant.spec.linear import PackedLinear, Spec


def random_linear(spec: Spec, rows: int, channels: int) -> PackedLinear:
    """A packed linear of random codes on the GPU."""
    tensors = {}
    for name, field in spec.layout(channels, rows).fields().items():
        if field.dtype == torch.int32:
            tensors[name] = torch.randint(-(2**31), 2**31 - 1, field.shape, dtype=torch.int32, device="cuda")
        elif name == "pairs":
            order = torch.rand(field.shape[0], channels // spec.group_size, spec.group_size, device="cuda").argsort(-1)
            tensors[name] = order.to(torch.int16).view(field.shape)
        else:
            tensors[name] = torch.rand(field.shape, device="cuda").mul_(0.01).add_(0.001).half()
    return PackedLinear(spec.layout(channels, rows), tensors)


def microseconds(call: Callable[[], object], repeats: int = 200) -> tuple[float, float]:
    """Of one call: on the GPU, from a graph of many calls; on the host, launching without waiting."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        call()
    host = (time.perf_counter() - start) / 20
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats * 1000, host * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["128256x4096", "151936x2048"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 6, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "us per call, us on the host": {}}
    for shape in options.shapes:
        rows, channels = map(int, shape.split("x"))
        weight = torch.randn(rows, channels, device="cuda", dtype=torch.bfloat16)
        calls: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"bf16": lambda x, w=weight: F.linear(x, w)}
        for bits in options.bits:
            spec = Spec(bits=bits, group_size=128)
            (ready,) = prepare_all([random_linear(spec, rows, channels)], torch.bfloat16)

            def launched(x: torch.Tensor, ready=ready) -> torch.Tensor:
                backend = BY_NAME[ready.backend]
                return run(backend, x, ready.tensors, None, ready.out_features, ready.group_size)

            calls[f"{bits} bits, launched"], calls[f"{bits} bits, graph"] = launched, Replayed(launched)
        times = {}
        for tokens in options.tokens:
            x = torch.randn(tokens, channels, device="cuda", dtype=torch.bfloat16)
            for name, call in calls.items():
                times[f"{name}, {tokens} tokens"] = [round(t, 1) for t in microseconds(lambda call=call, x=x: call(x))]
                print(shape, name, tokens, times[f"{name}, {tokens} tokens"], flush=True)
        found["us per call, us on the host"][shape] = times
        del weight, calls
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
