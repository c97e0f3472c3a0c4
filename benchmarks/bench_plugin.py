"""The vLLM plugin's own linear layers against AWQ-Marlin and fp16, on one NVIDIA GPU, with or without vLLM there.

    python benchmarks/bench_plugin.py [--peers .peers] [--output benchmarks/results/plugin.json]

The linears of one decoder block, merged as vLLM merges them (q/k/v, gate/up), each made by the plugin's
`create_weights`, filled through its loaders, repacked by `process_weights_after_loading`, checked against its decoded
weight and called through `apply`; microseconds a block, measured as in bench_kernels.py, for as many tokens as there
are requests decoding at once. Where vLLM is not installed, stand-ins take the place of the three classes that the
plugin derives from: they hold a parameter, no more.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import triton
from bench_kernels import DEVICE, GROUP, MODELS, ROTATIONS, copies, measure, random_marlin, save
from torch import nn

from pairquant import __version__
from pairquant.core.linear import decode
from pairquant.integrations.vllm import compat
from pairquant.spec.linear import PackedLinear, Spec, transform_names

REQUESTS = (1, 8, 32)
TOLERANCE = 5e-3


class HeldParameter(nn.Parameter):
    """Stands in for vLLM's parameters, which know how tensor parallelism cuts them."""

    def __new__(cls, data: torch.Tensor, weight_loader: Any, **cut: Any) -> HeldParameter:
        parameter = super().__new__(cls, data, requires_grad=False)
        parameter.weight_loader = weight_loader
        return parameter


def plugin_method(sizes: tuple[int, ...], channels: int) -> Any:
    """The plugin's linear method, over vLLM's classes or the stand-ins."""
    if find_spec("vllm") is None:
        stand_ins = {"GroupQuantScaleParameter": HeldParameter, "PackedvLLMParameter": HeldParameter}
        vars(compat).update(
            stand_ins, LinearMethodBase=object, register_weight_loader_v2_supported_method=lambda cls: cls
        )
    from pairquant.integrations.vllm.linear import PairQuantLinearMethod

    return PairQuantLinearMethod(Spec(4, GROUP, ROTATIONS), f"{'+'.join(map(str, sizes))}x{channels}")


def random_linears(sizes: tuple[int, ...], channels: int, shared: bool) -> list[PackedLinear]:
    """4-bit linears of one input; shared: one transform for all."""
    linears: list[PackedLinear] = []
    for size in sizes:
        layout = Spec(4, GROUP, ROTATIONS).layout(channels, size)
        tensors = {name: random_field(name, field) for name, field in layout.fields().items()}
        if shared and linears:
            tensors |= {name: linears[0][name] for name in transform_names(layout)}
        linears.append(PackedLinear(layout, tensors))
    return linears


def random_field(name: str, field: Any) -> torch.Tensor:
    if field.dtype == torch.int32:
        return torch.randint(-(2**31), 2**31, field.shape, device=DEVICE, dtype=torch.int64).to(torch.int32)
    if name == "pairs":
        return (
            torch.rand(ROTATIONS, field.shape[1] // GROUP, GROUP, device=DEVICE).argsort(-1).view(field.shape).short()
        )
    values = torch.rand(field.shape, device=DEVICE)
    return {"scales": values * 0.01 + 1e-3, "channel_scales": values + 0.5, "theta": values}[name].half()


def loaded_layer(method: Any, linears: list[PackedLinear]) -> nn.Module:
    """A layer as the plugin leaves it once vLLM has loaded a checkpoint."""
    sizes, channels = [p.layout.out_features for p in linears], linears[0].layout.in_features
    layer, rows = nn.Module(), sum(sizes)
    with DEVICE:
        method.create_weights(layer, channels, sizes, channels, rows, torch.half, weight_loader=place)
    starts = dict.fromkeys(linears[0].tensors, 0)
    for slot, linear in enumerate(linears):
        for name, tensor in linear.tensors.items():
            parameter = getattr(layer, name)
            parameter.start = starts[name]
            parameter.weight_loader(parameter, tensor, slot)
            starts[name] += tensor.shape[-1]
    method.process_weights_after_loading(layer)
    return layer


def place(parameter: Any, loaded: torch.Tensor, slot: int) -> None:
    """Side by side, as vLLM's loader puts what it merges."""
    parameter.data[:, parameter.start : parameter.start + loaded.shape[1]] = loaded


def require_right(method: Any, layer: nn.Module, linears: list[PackedLinear]) -> None:
    x = torch.randn(3, linears[0].layout.in_features, device=DEVICE).half()
    expected = x.float() @ torch.cat([decode(linear) for linear in linears]).T
    error = ((method.apply(layer, x).float() - expected).norm() / expected.norm()).item()
    if not error < TOLERANCE:
        raise RuntimeError(f"{method.prefix}: apply is {error:.2e} from the decoded weight, allowed: {TOLERANCE}")


def bench_layer(sizes: tuple[int, ...], channels: int, peers: Any) -> dict[int, dict[str, float]]:
    """Requests → method → microseconds."""
    method, size = plugin_method(sizes, channels), sum(sizes) * channels // 2
    linears = {shared: random_linears(sizes, channels, shared) for shared in (True, False)}
    layers = {s: copies(lambda s=s: loaded_layer(method, linears[s]), size) for s in linears}
    for shared, several in layers.items():
        require_right(method, several[0], linears[shared])
    dense = copies(lambda: torch.randn(sum(sizes), channels, dtype=torch.half, device=DEVICE), size * 4)
    marlin = copies(lambda: random_marlin(peers, sum(sizes), channels), size) if peers else []
    result = {}
    for requests in REQUESTS:
        x = torch.randn(requests, channels, dtype=torch.half, device=DEVICE)
        row = {
            "fp16": measure([lambda w=w: nn.functional.linear(x, w) for w in dense]),
            "pairquant": measure([lambda m=m: method.apply(m, x) for m in layers[True]]),
            "pairquant, unshared": measure([lambda m=m: method.apply(m, x) for m in layers[False]]),
        }
        if peers:
            row["AWQ-Marlin"] = measure([lambda m=m: m(x) for m in marlin])
        result[requests] = row
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder of the peers' sources (see kernel_peers.py)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/plugin.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    peers: Any = None
    if options.peers:
        import kernel_peers as peers

        peers.load_marlin(options.peers)
    versions = {"pairquant": __version__, "torch": torch.__version__, "triton": triton.__version__}
    blocks: dict[str, Any] = {}
    results = {
        "device": torch.cuda.get_device_name(),
        "versions": versions,
        "vllm": "installed" if find_spec("vllm") else "not installed: stand-ins for its base classes",
        "unit": "us a block",
        "blocks": blocks,
    }
    for model, shapes in MODELS.items():
        by_shape = [bench_layer(sizes, channels, peers) for sizes, channels in shapes]
        methods = by_shape[0][1]
        blocks[model] = {n: {m: round(sum(shape[n][m] for shape in by_shape), 2) for m in methods} for n in REQUESTS}
        print(model, *(f"  {n:3} requests: {row}" for n, row in blocks[model].items()), sep="\n", flush=True)
        save(results, options.output)


if __name__ == "__main__":
    main()
