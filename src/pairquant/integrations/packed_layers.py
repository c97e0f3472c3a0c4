"""How layers of serving engines load and run packed weights: what vLLM and SGLang, whose layers have one origin, share.

The stored tensors arrive in parameters of their own shapes: codes, zero points and scales side by side for the linears
that the engine merges, transforms in a slot for each. Once all are there they are checked and repacked for the kernels, in
as few launches as the device allows, and the stored ones go.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.base import Prepared
from ..backends.fused_ops import norm_linear, silu_linear
from ..backends.ops import run
from ..backends.table import BY_NAME, DENSE, prepare_all
from ..spec.fields import ROWS, Field
from ..spec.linear import LinearLayout, PackedLinear, Spec
from ..support.errors import CheckpointError, ConfigError

#: The engines' names for the linears in merged layers of attention, by place.
ATTENTION_SHARDS = {"q": 0, "k": 1, "v": 2}


class PackedLinearMethod(ABC):
    """Creates, loads, checks, repacks and runs the weights of one layer, at `prefix` in the engine's model.

    An engine's own class derives from this one and from the engine's base of linear methods, and says how rows are loaded.
    """

    def __init__(self, spec: Spec, prefix: str):
        self.spec, self.prefix = spec, prefix

    @abstractmethod
    def rank_of(self, layer: Any) -> int:
        """Return the rank, in tensor parallelism, whose part of its channels a layer gets."""

    @abstractmethod
    def by_rows(self, layer: Any, name: str, stored: Field, extra: dict[str, Any]) -> nn.Parameter:
        """Return the parameter for a tensor [channels, rows], with a loader; `layer.pairquant` is what is to be loaded.

        extra: what the engine gave `create_weights` beside the sizes.
        """

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register parameters in the stored dtypes. Raises `ConfigError` when tensor parallelism would split a group."""
        layouts = [self.spec.layout(input_size_per_partition, size) for size in output_partition_sizes]
        self._require_whole_groups(layouts, input_size, output_size)
        layer.pairquant = pending = Pending(self.prefix, layouts, params_dtype, input_size)
        whole = self.spec.layout(input_size_per_partition, sum(output_partition_sizes))
        for name, stored in whole.fields().items():
            if stored.axis(ROWS) is None:
                shape = (len(layouts), *stored.shape)
                parameter = nn.Parameter(torch.empty(shape, dtype=stored.dtype), requires_grad=False)
                parameter.weight_loader = pending.transform_loader(name, lambda: self.rank_of(layer))  # type: ignore[attr-defined]
            else:
                parameter = self.by_rows(layer, name, stored, extra)
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded and repack it. Raises `CheckpointError` naming the tensor that is missing or damaged."""
        if not isinstance(pending := layer.pairquant, Pending):
            return
        linears = pending.linears({name: getattr(layer, name).data for name in pending.layouts[0].fields()})
        for name in pending.layouts[0].fields():
            delattr(layer, name)
        layer.pairquant = Ready.build(layer, linears, pending.dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., C] → [..., N]."""
        ready: Ready = layer.pairquant
        if len(ready.prepared) == 1:
            return ready.run(layer, 0, x, bias)
        y = torch.cat([ready.run(layer, i, x, None) for i in range(len(ready.prepared))], dim=-1)
        return y if bias is None else y + bias

    def _require_whole_groups(self, layouts: Sequence[LinearLayout], input_size: int, output_size: int) -> None:
        for layout in layouts:
            if not (faults := layout.misfits()):
                continue
            if layout.in_features == input_size and sum(part.out_features for part in layouts) == output_size:
                raise CheckpointError(
                    f"{self.prefix}: {'; '.join(faults)}. The checkpoint does not belong to this model."
                )
            raise ConfigError(
                f"{self.prefix} ({input_size} → {output_size}) cannot be split over this many GPUs: {'; '.join(faults)}. "
                "Choose a --tensor-parallel-size that leaves whole groups on each, or --pipeline-parallel-size."
            )


class Pending:
    """A layer that is being loaded: layouts of the linears merged in it, and which of their tensors have come."""

    def __init__(self, prefix: str, layouts: list[LinearLayout], dtype: torch.dtype, input_size: int):
        """input_size: channels of the whole linear, of which tensor parallelism may have left this rank a part."""
        self.prefix, self.layouts, self.dtype = prefix, layouts, dtype
        self.whole = replace(layouts[0], in_features=input_size).fields()
        self.arrived: dict[str, set[int]] = {name: set() for name in layouts[0].fields()}

    def slots(self, shard: Any) -> list[int]:
        """Return places of the linears that a tensor is for: the engine names one, several that are fused on disk, or (None) all."""
        if shard is None:
            return list(range(len(self.layouts)))
        return [
            ATTENTION_SHARDS[s] if isinstance(s, str) else s for s in (shard if isinstance(shard, tuple) else (shard,))
        ]

    def counting(self, name: str, load: Callable) -> Callable:
        """Return the engine's loader of `name`, wrapped so that its calls are counted."""

        def loader(parameter: nn.Parameter, loaded: Tensor, *shard: Any, **kwargs: Any) -> None:
            self.require_dtype(name, parameter, loaded)
            load(parameter, loaded, *shard, **kwargs)
            self.arrived[name].update(self.slots(shard[0] if shard else kwargs.get("loaded_shard_id")))

        return loader

    def transform_loader(self, name: str, rank: Callable[[], int]) -> Callable:
        """Puts a transform's tensor into its slots: all of it, or the channels that are this rank's.

        rank: asked when a tensor has come, since engines settle it after the layer has been made.
        """

        def loader(parameter: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
            self.require_dtype(name, parameter, loaded)
            self.require_shape(name, loaded, self.whole[name].shape)
            channels = parameter.shape[-1]
            if loaded.shape[-1] != channels:
                loaded = loaded.narrow(-1, rank() * channels, channels)
            for slot in self.slots(shard):
                parameter.data[slot].copy_(loaded)
                self.arrived[name].add(slot)

        return loader

    def linears(self, stored: dict[str, Tensor]) -> list[PackedLinear]:
        """Return the linears, each checked."""
        for name, slots in self.arrived.items():
            if missing := set(range(len(self.layouts))) - slots:
                raise self.damaged(name, f"is missing for {len(missing)} of {len(self.layouts)} linears")
        cut = {}
        for name, tensor in stored.items():
            widths = [layout.fields()[name].shape[-1] for layout in self.layouts]
            by_row = self.layouts[0].fields()[name].axis(ROWS) is not None
            cut[name] = list(tensor.split(widths, dim=-1)) if by_row else list(tensor)
        found = []
        for i, layout in enumerate(self.layouts):
            packed = PackedLinear(layout, {name: parts[i].contiguous() for name, parts in cut.items()})
            packed.check_values(self.prefix)
            found.append(packed)
        return found

    def require_dtype(self, name: str, parameter: nn.Parameter, loaded: Tensor) -> None:
        """Raise `CheckpointError` for a tensor of another dtype than its parameter."""
        if loaded.dtype != parameter.dtype:
            raise self.damaged(name, f"is {loaded.dtype}, must be {parameter.dtype}")

    def require_shape(self, name: str, loaded: Tensor, shape: Sequence[int]) -> None:
        """Raise `CheckpointError` for a tensor of another shape."""
        if tuple(loaded.shape) != tuple(shape):
            raise self.damaged(name, f"has shape {list(loaded.shape)}, must be {list(shape)}")

    def damaged(self, name: str, fault: str) -> CheckpointError:
        """Return the error to raise for a faulty tensor of this layer."""
        return CheckpointError(
            f"tensor {self.prefix}.{name} {fault}. The checkpoint is damaged: download or quantize it again."
        )


class Ready:
    """A layer that runs: what its backend prepared, the tensors as buffers of the layer.

    The first buffer is called `weight` where it is the dense weight, else `qweight`: engines look there for the device of
    a layer that gets LoRA adapters.
    """

    def __init__(self, prepared: list[Prepared]):
        self.names = [[f"prepared_{i}_{j}" for j in range(len(p.tensors))] for i, p in enumerate(prepared)]
        self.names[0][0] = "weight" if prepared[0].backend == DENSE.name else "qweight"
        self.prepared = [replace(p, tensors=[]) for p in prepared]  # the layer holds the tensors

    @classmethod
    def build(cls, layer: Any, linears: list[PackedLinear], dtype: torch.dtype) -> Ready:
        """Prepare the linears for activations of this dtype, and give the layer the tensors."""
        made = prepare_all(linears, dtype)
        ready = cls(made)
        for prepared, names in zip(made, ready.names, strict=True):
            for name, tensor in zip(names, prepared.tensors, strict=True):
                layer.register_buffer(name, tensor, persistent=False)
        return ready

    def run(self, layer: Any, index: int, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., C] → [..., N] of one of the prepared."""
        tensors, prepared = [getattr(layer, name) for name in self.names[index]], self.prepared[index]
        backend, sizes = BY_NAME[prepared.backend], prepared.out_features
        return run(backend, x, tensors, bias, sizes, prepared.group_size, prepared.activations)

    def run_after_norm(
        self, layer: Any, x: Tensor, residual: Tensor, norm: Tensor, eps: float, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the only prepared on the RMSNorm of x + residual, both [..., C]: [..., N], and the sum."""
        tensors, one = [getattr(layer, name) for name in self.names[0]], self.prepared[0]
        return norm_linear(x, residual, norm, eps, tensors, bias, list(one.out_features), one.group_size, one.backend)

    def run_after_silu(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """Run the only prepared on silu(gate) · up, x [..., 2 C] → [..., N]."""
        tensors, one = [getattr(layer, name) for name in self.names[0]], self.prepared[0]
        return silu_linear(x, tensors, bias, list(one.out_features), one.group_size, one.backend)
