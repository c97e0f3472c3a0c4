"""How vLLM's embeddings load and run packed weights: the output's (`ParallelLMHead`) and the input's (`VocabParallelEmbedding`).

vLLM pads their rows and shares them out to the ranks of tensor parallelism; each rank loads the codes of its own rows, and
the rows that only fill up get scales of zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.run.replay import Replayed
from ...layers.embedding import Rows
from ...spec.codes import columns_per_block
from ...spec.fields import ROWS
from ...spec.linear import PackedLinear
from ...support.errors import ConfigError
from ..packed_layers import Pending
from .linear import PairQuantLinearMethod


class VocabularyMethod(PairQuantLinearMethod):
    """Creates and loads the weight of an embedding at `prefix` in vLLM's model, a row for each token."""

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
        """Register parameters in the stored dtypes for this rank's rows, with those that fill up.

        Raises `ConfigError` if tensor parallelism would split a packed word.
        """
        (rows,) = output_partition_sizes
        layout = self.spec.layout(input_size, rows)
        unit, first = columns_per_block(self.spec.bits), layer.shard_indices.org_vocab_start_index
        if rows % unit or first % unit:
            raise ConfigError(
                f"{self.prefix} with {output_size} rows at {self.spec.bits} bits cannot be split over this many GPUs: its rows "
                f"are packed in {unit}s. Choose a smaller --tensor-parallel-size."
            )
        layer.pairquant = Pending(self.prefix, [layout], params_dtype, input_size)
        for name, stored in layout.fields().items():
            by_row = stored.axis(ROWS) is not None
            shape = stored.shape if by_row else (1, *stored.shape)
            parameter = nn.Parameter(torch.zeros(shape, dtype=stored.dtype), requires_grad=False)
            load = (
                _row_loader(layer, layer.pairquant, name, rows)
                if by_row
                else layer.pairquant.transform_loader(name, lambda: 0)  # every rank has all channels
            )
            parameter.weight_loader = load  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)


class PairQuantHeadMethod(VocabularyMethod):
    """Also checks, repacks and runs the weight of an output embedding."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """See `PairQuantLinearMethod`. vLLM calls this layer outside its CUDA graphs, so it gets some of its own."""
        super().process_weights_after_loading(layer)
        layer.pairquant_replayed = Replayed(partial(super().apply, layer))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [M, C] → [M, N]."""
        y: Tensor = layer.pairquant_replayed(x)
        return y if bias is None else y + bias


class PairQuantEmbeddingMethod(VocabularyMethod):
    """Also checks, rearranges and looks up the rows of an input embedding."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded and arrange it by rows. Raises `CheckpointError` naming the tensor that is missing or damaged."""
        if not isinstance(pending := layer.pairquant, Pending):
            return
        names = pending.layouts[0].fields()
        (packed,) = pending.linears({name: getattr(layer, name).data for name in names})
        for name in names:
            delattr(layer, name)
        layer.pairquant = _Lookup.build(layer, packed, pending.dtype)

    def embedding(self, layer: Any, tokens: Tensor) -> Tensor:
        """tokens, integer [M] → [M, C]."""
        ready: _Lookup = layer.pairquant
        return ready.rows(layer).look_up(tokens, ready.bits).to(ready.dtype)


@dataclass(frozen=True)
class _Lookup:
    """An input embedding that is ready; the layer holds the tensors of its `Rows` as buffers.

    planes: the names of the planes. The first is called `weight`: vLLM looks there for the device of an embedding that gets
    LoRA adapters.
    """

    bits: int
    planes: tuple[str, ...]
    dtype: torch.dtype

    @classmethod
    def build(cls, layer: Any, packed: PackedLinear, dtype: torch.dtype) -> _Lookup:
        rows = Rows.of(packed)
        names = ("weight", *(f"plane_{i}" for i in range(1, len(rows.planes))))
        for name, tensor in (*zip(names, rows.planes, strict=True), *rows.others().items()):
            layer.register_buffer(name, tensor, persistent=False)
        return cls(packed.layout.bits, names, dtype)

    def rows(self, layer: Any) -> Rows:
        planes = [getattr(layer, name) for name in self.planes]
        return Rows(planes, **{name: getattr(layer, name) for name in Rows.OTHERS})


def _row_loader(layer: Any, pending: Pending, name: str, rows: int) -> Callable:
    """Return what puts this rank's rows of a tensor, [channels, rows or words], into its parameter."""

    def loader(parameter: nn.Parameter, loaded: Tensor) -> None:
        pending.require_dtype(name, parameter, loaded)
        channels, width = parameter.shape
        whole = layer.org_vocab_size * width // rows
        if tuple(loaded.shape) != (channels, whole):
            raise pending.damaged(name, f"has shape {list(loaded.shape)}, must be {[channels, whole]}")
        shard = layer.shard_indices
        first, last = (index * width // rows for index in (shard.org_vocab_start_index, shard.org_vocab_end_index))
        parameter.data[:, : last - first].copy_(loaded[:, first:last])
        pending.arrived[name].add(0)

    return loader
