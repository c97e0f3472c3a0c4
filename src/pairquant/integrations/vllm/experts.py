"""How vLLM loads and runs packed experts.

At 4 bits on an NVIDIA GPU they are run from their codes by our kernels, tensor or expert parallel. All others, and those with
biases, are decoded once and run by vLLM's own kernels for plain experts, which takes the memory of the unquantized
model; vLLM's own loader then cuts them for several GPUs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ...backends.experts import ACTIVATIONS, Experts, experts_refusal
from ...core.linear import decode
from ...spec.experts import DOWN, EXPERT, TRANSFORM, pool_of
from ...spec.fields import CHANNELS, ROWS
from ...spec.linear import PackedLinear, Spec
from ...support.errors import CheckpointError, ConfigError
from .compat import FusedMoEMethodBase, UnquantizedFusedMoEMethod, apply_moe_activation

#: vLLM's names for the parts of an expert.
SHARDS = {"gate_proj": "w1", "w1": "w1", "up_proj": "w3", "w3": "w3", "down_proj": "w2", "w2": "w2"}


def experts_method(specs: Mapping[str, Spec], prefix: str, layer: Any) -> Any:
    """Return what loads and runs the experts of a layer.

    specs: by path, of every expert's weights; prefix: what the experts are named by.
    """
    moe = layer.moe_config
    device, dtype = torch.empty(0).device, moe.in_dtype  # vLLM makes its layers on the device that they run on
    alike = len(set(specs.values())) == 1 and not moe.has_bias
    spec = next(iter(specs.values()))
    if alike and experts_refusal(spec.layout(128, 128), device, dtype) is None:
        return Int4ExpertsMethod(specs, prefix, moe)
    return DecodedExpertsMethod(specs, prefix, moe)


class _Arrivals:
    """The packed tensors of one block's experts, until all have been loaded."""

    def __init__(self, specs: Mapping[str, Spec], prefix: str):
        self.specs, self.prefix = dict(specs), prefix
        self.tensors: dict[str, Tensor] = {}

    def take_from(self, layer: Any, cut: Any = None) -> None:
        """Take in the packed tensors that vLLM gives to the layer; all others go to the layer's own loader.

        cut: returns what this rank needs of a tensor, given its name below the prefix; None if nothing.
        """
        plain = layer.load_weights

        def load_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
            others = []
            for name, tensor in weights:
                if not self._is_packed(name):
                    others.append((name, tensor))
                    continue
                kept = tensor if cut is None else cut(name, tensor)
                if kept is not None:
                    self.tensors[name] = kept
                part = name.rpartition(".")[0].rpartition(".")[2]
                yield "w2_weight" if part in DOWN or name.startswith("down_") else "w13_weight"
            yield from plain(others)

        layer.load_weights = load_weights

    def _is_packed(self, name: str) -> bool:
        path, _, _ = name.rpartition(".")
        return f"{self.prefix}.{path}" in self.specs or name.startswith(("gate_up_weight_", "down_weight_"))

    def packed(self, path: str) -> PackedLinear:
        """Return one weight. Raises `CheckpointError` naming a tensor that is missing or damaged."""
        spec = self.specs[path]
        own = path.removeprefix(f"{self.prefix}.")
        pool = pool_of(path).removeprefix(f"{self.prefix}.")
        names = {name: f"{pool}_weight_{name}" for name in TRANSFORM}
        names |= {name: f"{own}.{name}" for name in ("qweight", "qzeros", "scales")}
        for name in names.values():
            if name not in self.tensors:
                raise CheckpointError(f"tensor {self.prefix}.{name} is missing. The checkpoint is damaged.")
        tensors = {name: self.tensors[full] for name, full in names.items()}
        channels, words = tensors["qweight"].shape
        return PackedLinear.from_tensors(path, spec.layout(channels, words * 32 // spec.bits), tensors)


class Int4ExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]  # vLLM's class is looked up late
    """Runs experts from their codes on a GPU. specs, prefix: as of `experts_method`; moe: vLLM's configuration."""

    def __init__(self, specs: Mapping[str, Spec], prefix: str, moe: Any):
        super().__init__(moe)
        self.arrivals = _Arrivals(specs, prefix)
        self.spec = next(iter(specs.values()))

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int, **extra: Any
    ) -> None:
        """Take in the packed tensors when they are loaded. Raises `ConfigError` when tensor parallelism would split a group."""
        inner = intermediate_size_per_partition
        self.layouts = {"up": self.spec.layout(hidden_size, inner), "down": self.spec.layout(inner, hidden_size)}
        parallel = self.moe.moe_parallel_config
        if faults := [fault for layout in self.layouts.values() for fault in layout.misfits()]:
            raise ConfigError(
                f"{self.arrivals.prefix}: {inner} channels inside each expert on each of {parallel.tp_size} GPUs: "
                f"{'; '.join(faults)}. Whole experts fit: use --enable-expert-parallel, or another --tensor-parallel-size."
            )
        self.device, self.rank = torch.empty(0).device, parallel.tp_rank
        self.arrivals.take_from(layer, lambda name, tensor: self._cut(layer, name, tensor))

    def _cut(self, layer: Any, name: str, tensor: Tensor) -> Tensor | None:
        """Return this rank's share of a stored tensor: of its experts, and of their inner channels."""
        if name.startswith(("gate_up_weight_", "down_weight_")):
            down, field = name.startswith("down_"), name.rpartition("_weight_")[2]
        else:
            number, part, field = name.split(".")
            down = part in DOWN
            if layer._map_global_expert_id_to_local_expert_id(int(number)) < 0:
                return None
        stored = self.layouts["down" if down else "up"].fields()[field]
        axis = stored.axis(CHANNELS if down else ROWS)
        if axis is not None and tensor.shape[axis] != stored.shape[axis]:
            tensor = tensor.narrow(axis, self.rank * stored.shape[axis], stored.shape[axis])
        return tensor.to(self.device)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded and repack it. Raises `CheckpointError` naming the tensor that is missing or damaged."""
        experts: dict[int, dict[str, str]] = {}
        for path in self.arrivals.specs:
            found = EXPERT.fullmatch(path)
            assert found is not None, "experts have numbers"
            local = layer._map_global_expert_id_to_local_expert_id(int(found["number"]))
            if local >= 0:
                experts.setdefault(local, {})[SHARDS[found["part"]]] = path
        made = []
        for shards in (("w1", "w3"), ("w2",)):
            paths = [[parts[s] for s in shards if s in parts] for _, parts in sorted(experts.items())]
            linears = [[self.arrivals.packed(path) for path in each] for each in paths]
            for i, (each, packed) in enumerate(zip(paths, linears, strict=True)):
                for path, linear in zip(each, packed, strict=True):
                    linear.check_values(path, transform=i == 0)
            made.append(linears)
        self.experts = Experts.build(*made)
        self.arrivals.tensors.clear()
        _warm_up_once(self.experts, _known_activation(layer), self.moe.in_dtype)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Return None: our kernels need nothing of it."""

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Run the experts: x [T, H], and each token's experts with their weights [T, k] → [T, H]."""
        ids = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        activation = _known_activation(layer)
        between = None if activation else partial(_activated, layer)
        return self.experts.run(x, ids, topk_weights, activation, between)


#: Shapes of experts whose kernels have been compiled by this process.
_WARM: set[tuple[Any, ...]] = set()


def _warm_up_once(experts: Experts, activation: str, dtype: torch.dtype) -> None:
    key = (experts.up.layout, experts.down.layout, experts.up.count, activation, dtype)
    if key not in _WARM:
        _WARM.add(key)
        experts.warm_up(activation, dtype)


def _known_activation(layer: Any) -> str:
    """Return which of `ACTIVATIONS` the layer has between gate and up; "" if another."""
    name = layer.activation.value
    return name if name in ACTIVATIONS and layer.swiglu_limit is None else ""


def _activated(layer: Any, joined: Tensor) -> Tensor:
    """Apply vLLM's own activation: [A, 2 I] or, without a gate, [A, I] → [A, I]."""
    activation = layer.activation
    out = joined.new_empty(len(joined), joined.shape[1] // (2 if activation.is_gated else 1))
    options = {"clamp_limit": layer.swiglu_limit}
    options |= {"alpha": layer.swiglu_alpha} if layer.swiglu_alpha is not None else {}
    options |= {"beta": layer.swiglu_beta} if layer.swiglu_beta is not None else {}
    return apply_moe_activation(activation, out, joined, **options)


class DecodedExpertsMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]  # vLLM's class is looked up late
    """Fills vLLM's plain parameters with the decoded experts. specs, prefix: as of `experts_method`."""

    def __init__(self, specs: Mapping[str, Spec], prefix: str, moe: Any):
        super().__init__(moe)
        self.arrivals = _Arrivals(specs, prefix)

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Register vLLM's plain parameters, and take in the packed tensors when they are loaded."""
        super().create_weights(layer, *args, **kwargs)
        _tell_once(len({path.rpartition(".")[0] for path in self.arrivals.specs}))
        self.arrivals.take_from(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Decode every expert into vLLM's parameters. Raises `CheckpointError` naming a tensor that is missing or damaged."""
        for path in self.arrivals.specs:
            found = EXPERT.fullmatch(path)
            assert found is not None, "experts have numbers"
            shard, number = SHARDS[found["part"]], int(found["number"])
            parameter = layer.w2_weight if found["part"] in DOWN else layer.w13_weight
            weight = decode(self.arrivals.packed(path).to(parameter.device)).to(parameter.dtype)
            layer.weight_loader(parameter, weight, f"{shard}.weight", shard, number, return_success=False)
        self.arrivals.tensors.clear()
        super().process_weights_after_loading(layer)


@cache
def _tell_once(count: int) -> None:
    logging.getLogger("vllm.pairquant").warning(
        "experts (%d in a block) are decoded on loading: they take as much memory as in the unquantized model", count
    )
