"""How vLLM loads and runs packed experts.

Where `backends.experts` has something for them, they are run from their codes, tensor or expert parallel. All others are
decoded once and run by vLLM's own kernels for plain experts, which takes the memory of the unquantized model; vLLM's own
loader then cuts them for several GPUs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ...backends.experts import choose_experts, explain_experts
from ...backends.experts_base import Experts
from ...core.linear import decode
from ...spec.experts import DOWN, EXPERT, shared_name
from ...spec.fields import CHANNELS, ROWS
from ...spec.linear import LinearLayout, PackedLinear, Spec
from ...support.errors import CheckpointError, ConfigError
from .compat import FusedMoEMethodBase, UnquantizedFusedMoEMethod
from .expert_activations import between, known_activation

#: vLLM shows what loggers below its own say.
LOGGER = logging.getLogger("vllm.pairquant")
#: vLLM's names for the parts of an expert.
SHARDS = {"gate_proj": "w1", "w1": "w1", "up_proj": "w3", "w3": "w3", "down_proj": "w2", "w2": "w2"}


def experts_method(
    specs: Mapping[str, Spec], prefix: str, layer: Any, stored_as: Mapping[str, str], per_expert: bool = False
) -> Any:
    """Return what loads and runs the experts of a layer.

    specs: by path, of every expert's weights; prefix: what the experts are named by; stored_as: path → that in the checkpoint;
    per_expert: whether each expert has a transform of its own. Raises `ConfigError` for experts that must be decoded and round
    what they read, because nothing in vLLM would do that.
    """
    moe, spec = layer.moe_config, next(iter(specs.values()))
    arrivals = Arrivals(specs, prefix, stored_as, per_expert)
    device = torch.empty(0).device  # vLLM makes its layers on the device that they run on
    kind, reason = _choice(specs, layer, device, per_expert)
    if kind is not None:
        return PackedExpertsMethod(arrivals, moe, kind)
    if spec.activations is not None:  # decoded ones are vLLM's own layers, which round nothing
        raise ConfigError(
            f"{prefix}: these experts round what they read to {spec.activations}, and nothing in vLLM does that here: {reason}. "
            "Run the model with Transformers, or quantize it without --activations."
        )
    _tell_once(len({path.rpartition(".")[0] for path in specs}), reason)
    return DecodedExpertsMethod(arrivals, moe)


def _choice(
    specs: Mapping[str, Spec], layer: Any, device: torch.device, per_expert: bool
) -> tuple[type[Experts] | None, str]:
    """Return what runs the experts of a layer from their codes, or None and the reason, in words, why nothing does."""
    if len(set(specs.values())) > 1:
        return None, "they differ in bits, group size or rotations"
    if not known_activation(layer) and between(layer, device) is None:
        return None, f"nothing here computes {layer.activation.value} between their products on a CPU"
    moe = layer.moe_config
    layouts = _layouts_of_a_rank(next(iter(specs.values())), moe).values()
    if faults := [fault for layout in layouts for fault in layout.misfits()]:
        inner, ranks = moe.intermediate_size_per_partition, moe.moe_parallel_config.tp_size
        return None, (
            f"{inner} channels inside each expert on each of {ranks} ranks: {'; '.join(faults)}. Whole experts fit: use "
            "--enable-expert-parallel, or another --tensor-parallel-size"
        )
    refusals = explain_experts(layouts, device, moe.in_dtype, per_expert).refusals
    reason = "; ".join(f"{name} {said}" for name, said in refusals.items())
    return choose_experts(layouts, device, moe.in_dtype, per_expert), reason


def _layouts_of_a_rank(spec: Spec, moe: Any) -> dict[str, LinearLayout]:
    """Return the layouts of what each rank holds of an expert: "up", which gate has too, and "down"."""
    hidden, inner = moe.hidden_dim, moe.intermediate_size_per_partition
    sizes = {"up": (hidden, inner), "down": (inner, hidden)}
    return {name: spec.layout(*size, moe.has_bias) for name, size in sizes.items()}


class Arrivals:
    """The packed tensors of one block's experts, under their names below `prefix`, until all have been loaded.

    specs: by path in vLLM's model; stored_as: the paths in the checkpoint that belong to those; per_expert: whether each expert
    has a transform of its own.
    """

    def __init__(self, specs: Mapping[str, Spec], prefix: str, stored_as: Mapping[str, str], per_expert: bool = False):
        self.specs, self.prefix, self.stored_as, self.per_expert = dict(specs), prefix, stored_as, per_expert
        self.tensors: dict[str, Tensor] = {}
        #: Returns what this rank needs of a tensor, given its name below the prefix; None if nothing.
        self.cut: Callable[[str, Tensor], Tensor | None] = lambda name, tensor: tensor

    def doors(self) -> dict[str, Callable[[Tensor], None]]:
        """Return what takes in each tensor, by the tensor's name in the checkpoint."""
        found: dict[str, Callable[[Tensor], None]] = {}
        for path, spec in self.specs.items():
            for stored, own in zip(self._names(self.stored_as[path], spec), self._own_names(path), strict=True):
                found[stored] = partial(self._take, own)
            found[f"{self.stored_as[path]}.bias"] = partial(self._take, f"{self._own(path)}.bias")
        return found

    def _take(self, name: str, tensor: Tensor) -> None:
        if (kept := self.cut(name, tensor)) is not None:
            self.tensors[name] = kept

    def _own(self, name: str) -> str:
        return name.removeprefix(f"{self.prefix}.")

    def _own_names(self, path: str) -> list[str]:
        return [self._own(name) for name in self._names(path, self.specs[path])]

    def _names(self, path: str, spec: Spec) -> list[str]:
        """Return the names of an expert's tensors, those of its transform too, in the order of their fields."""
        fields = spec.layout(128, 128).fields()  # the same names at every size
        return [shared_name(path, field, self.per_expert) or f"{path}.{field}" for field in fields]

    def packed(self, path: str, has_bias: bool = False) -> PackedLinear:
        """Return one weight, with its bias if it has one. Raises `CheckpointError` naming a tensor that is missing or damaged."""
        spec = self.specs[path]
        names = zip(spec.layout(128, 128).fields(), self._own_names(path), strict=True)
        tensors = {field: self._arrived(own) for field, own in names}
        if has_bias:
            tensors["bias"] = self.bias(path)
        layout = replace(spec.layout_around(tensors["qweight"]), bias=has_bias)
        return PackedLinear.from_tensors(path, layout, tensors)

    def bias(self, path: str) -> Tensor:
        """Return the bias [N] of one weight. Raises `CheckpointError` if it is missing."""
        return self._arrived(f"{self._own(path)}.bias")

    def require_no_bias(self) -> None:
        """Raise `CheckpointError` if a bias has come for experts that vLLM runs without."""
        for name in self.tensors:
            if name.endswith(".bias"):
                raise CheckpointError(
                    f"the checkpoint holds {self.prefix}.{name}, but vLLM runs these experts without biases. Run it with "
                    "Transformers."
                )

    def _arrived(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(
                f"tensor {self.prefix}.{name} is missing. The checkpoint is damaged, or --load-format is one that "
                "PairQuant cannot follow: use auto."
            )
        return self.tensors[name]


class PackedExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]  # vLLM's class is looked up late
    """Runs experts from their codes. moe: vLLM's configuration of the layer; kind: what runs them."""

    def __init__(self, arrivals: Arrivals, moe: Any, kind: type[Experts]):
        super().__init__(moe)
        self.arrivals, self.kind = arrivals, kind
        self.spec = next(iter(arrivals.specs.values()))

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int, **extra: Any
    ) -> None:
        """Say what this rank needs of the packed tensors."""
        self.layouts, parallel = _layouts_of_a_rank(self.spec, self.moe), self.moe.moe_parallel_config
        self.device, self.rank = torch.empty(0).device, parallel.tp_rank
        self.arrivals.cut = partial(self._cut, layer)

    def _cut(self, layer: Any, name: str, tensor: Tensor) -> Tensor | None:
        """Return this rank's share of a stored tensor: of its experts, and of their inner channels.

        Ranks of tensor parallelism are summed, so the first alone adds the bias of down.
        """
        # "gate_up_weight_theta" and, of one expert alone, "3.gate_up_weight_theta" or "3.gate_proj.qweight"
        place, _, field = name.rpartition("_weight_" if "_weight_" in name else ".")
        number, _, part = place.rpartition(".")
        down = part in ("down", *DOWN)
        if number and layer._map_global_expert_id_to_local_expert_id(int(number)) < 0:
            return None
        fields = self.layouts["down" if down else "up"].fields()
        if field not in fields:
            return tensor  # a bias, which is refused once all have come
        stored = fields[field]
        axis = stored.axis(CHANNELS if down else ROWS)
        if axis is not None and tensor.shape[axis] != stored.shape[axis]:
            tensor = tensor.narrow(axis, self.rank * stored.shape[axis], stored.shape[axis])
        if field == "bias" and down and self.rank:
            tensor = torch.zeros_like(tensor)
        return tensor.to(self.device)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded and repack it. Raises `CheckpointError` naming the tensor that is missing or damaged."""
        if not self.moe.has_bias:
            self.arrivals.require_no_bias()
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
            linears = [[self.arrivals.packed(path, self.moe.has_bias) for path in each] for each in paths]
            for i, (each, packed) in enumerate(zip(paths, linears, strict=True)):
                for path, linear in zip(each, packed, strict=True):
                    linear.check_values(path, transform=i == 0 or self.arrivals.per_expert)
            made.append(linears)
        self.experts = self.kind.build(*made)
        self.arrivals.tensors.clear()
        self.activation = known_activation(layer)
        self.between = None if self.activation else between(layer, self.device)
        _warm_up_once(self.experts, self.layouts, self.activation, self.moe.in_dtype)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Return None: our kernels need nothing of it."""

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Run the experts: x [T, H], and each token's experts with their weights [T, k] → [T, H]."""
        ids = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        return self.experts.run(x, ids, topk_weights, self.activation, self.between)


#: Shapes of experts whose kernels have been compiled by this process.
_WARM: set[tuple[Any, ...]] = set()


def _warm_up_once(experts: Experts, layouts: Mapping[str, LinearLayout], activation: str, dtype: torch.dtype) -> None:
    key = (type(experts), *layouts.values(), experts.up.count, activation, dtype)
    if key not in _WARM:
        _WARM.add(key)
        experts.warm_up(activation, dtype)


class DecodedExpertsMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]  # vLLM's class is looked up late
    """Fills vLLM's plain parameters with the decoded experts. moe: vLLM's configuration of the layer."""

    def __init__(self, arrivals: Arrivals, moe: Any):
        super().__init__(moe)
        self.arrivals = arrivals

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        *args: Any,
        **kw: Any,
    ) -> None:
        """Register vLLM's plain parameters, which may be larger than the weights."""
        self.inner = intermediate_size_per_partition
        super().create_weights(layer, num_experts, hidden_size, intermediate_size_per_partition, *args, **kw)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Decode every expert into vLLM's parameters. Raises `CheckpointError` naming a tensor that is missing or damaged."""
        if not self.moe.has_bias:
            self.arrivals.require_no_bias()
        for path in self.arrivals.specs:
            found = EXPERT.fullmatch(path)
            assert found is not None, "experts have numbers"
            shard, number = SHARDS[found["part"]], int(found["number"])
            parameter = layer.w2_weight if shard == "w2" else layer.w13_weight
            weight = decode(self.arrivals.packed(path).to(parameter.device)).to(parameter.dtype)
            layer.weight_loader(parameter, weight, f"{shard}.weight", shard, number, return_success=False)
            if self.moe.has_bias:
                self._load_bias(layer, shard, number, self.arrivals.bias(path))
        self.arrivals.tensors.clear()
        if layer.activation.value == "swigluoai":
            _interleave(layer.w13_weight)
            if self.moe.has_bias:
                _interleave(layer.w13_bias)
        super().process_weights_after_loading(layer)

    def _load_bias(self, layer: Any, shard: str, number: int, bias: Tensor) -> None:
        """Put a bias [N] in its place. Tensor parallel, the first rank alone adds that of down_proj: ranks are summed."""
        local, rank = layer._map_global_expert_id_to_local_expert_id(number), self.moe.moe_parallel_config.tp_rank
        if local < 0:
            return
        if shard == "w2":
            layer.w2_bias.data[local, : len(bias)] = bias if rank == 0 else torch.zeros_like(bias)
        else:
            start = layer.w13_bias.shape[1] // 2 if shard == "w3" else 0
            mine = bias[rank * self.inner : (rank + 1) * self.inner]
            layer.w13_bias.data[local, start : start + len(mine)] = mine


def _interleave(parameter: Tensor) -> None:
    """Turn [E, gates then ups, …] into gate, up, gate, up …, as the activation of gpt-oss wants them. In place."""
    for expert in parameter.data:
        inner = len(expert) // 2
        expert.copy_(torch.stack([expert[:inner], expert[inner:]], dim=1).flatten(0, 1))


@cache
def _tell_once(count: int, reason: str) -> None:
    LOGGER.warning(
        "experts (%d in a block) are decoded on loading and take as much memory as in the unquantized model: %s",
        count,
        reason,
    )
