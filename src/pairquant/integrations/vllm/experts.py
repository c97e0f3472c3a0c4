"""How vLLM loads packed experts: decoded once, then run by vLLM's own kernels for plain experts.

They take the room of the unquantized model in memory. vLLM's own loader cuts them for tensor and expert parallelism.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from torch import Tensor

from ...core.linear import decode
from ...spec.experts import DOWN, EXPERT, TRANSFORM, pool_of
from ...spec.linear import PackedLinear, Spec
from ...support.errors import CheckpointError
from .compat import UnquantizedFusedMoEMethod

#: vLLM's names for the parts of an expert.
SHARDS = {"gate_proj": "w1", "w1": "w1", "up_proj": "w3", "w3": "w3", "down_proj": "w2", "w2": "w2"}


class PairQuantExpertsMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]  # vLLM's class is looked up late
    """Collects the packed tensors of one block's experts, and fills vLLM's plain parameters from them.

    specs: by path, of every expert's weights; prefix: what the experts are named by.
    """

    def __init__(self, specs: Mapping[str, Spec], prefix: str, moe: Any):
        super().__init__(moe)
        self.specs, self.prefix = dict(specs), prefix
        self.arrived: dict[str, Tensor] = {}

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Register vLLM's plain parameters, and take in the packed tensors when they are loaded."""
        super().create_weights(layer, *args, **kwargs)
        _tell_once(len({path.rpartition(".")[0] for path in self.specs}))
        plain = layer.load_weights

        def load_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
            others = []
            for name, tensor in weights:
                if self._is_packed(name):
                    self.arrived[name] = tensor
                    part = name.rpartition(".")[0].rpartition(".")[2]
                    yield "w2_weight" if part in DOWN or name.startswith("down_") else "w13_weight"
                else:
                    others.append((name, tensor))
            yield from plain(others)

        layer.load_weights = load_weights

    def _is_packed(self, name: str) -> bool:
        path, _, _ = name.rpartition(".")
        return f"{self.prefix}.{path}" in self.specs or name.startswith(("gate_up_weight_", "down_weight_"))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Decode every expert into vLLM's parameters. Raises `CheckpointError` naming a tensor that is missing or damaged."""
        for path, spec in self.specs.items():
            found = EXPERT.fullmatch(path)
            assert found is not None, "experts have numbers"
            shard, number = SHARDS[found["part"]], int(found["number"])
            parameter = layer.w2_weight if found["part"] in DOWN else layer.w13_weight
            weight = decode(self._packed(path, spec).to(parameter.device)).to(parameter.dtype)
            layer.weight_loader(parameter, weight, f"{shard}.weight", shard, number, return_success=False)
        self.arrived.clear()
        super().process_weights_after_loading(layer)

    def _packed(self, path: str, spec: Spec) -> PackedLinear:
        own = path.removeprefix(f"{self.prefix}.")
        pool = pool_of(path).removeprefix(f"{self.prefix}.")
        names = {name: f"{pool}_weight_{name}" for name in TRANSFORM}
        names |= {name: f"{own}.{name}" for name in ("qweight", "qzeros", "scales")}
        for name in names.values():
            if name not in self.arrived:
                raise CheckpointError(f"tensor {self.prefix}.{name} is missing. The checkpoint is damaged.")
        tensors = {name: self.arrived[full] for name, full in names.items()}
        channels, words = tensors["qweight"].shape
        layout = spec.layout(channels, words * 32 // spec.bits)
        return PackedLinear.from_tensors(path, layout, tensors)


@cache
def _tell_once(count: int) -> None:
    logging.getLogger("vllm.pairquant").warning(
        "experts (%d in a block) are decoded on loading: they take as much memory as in the unquantized model", count
    )
