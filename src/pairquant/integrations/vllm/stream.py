"""What becomes of a checkpoint's tensors before vLLM's models see them.

Each of vLLM's models finds places for the tensors in its own way, by names that only linears have in common. So two kinds
are taken out of the stream first: packed experts go to the method that runs them, and packed linears which vLLM builds
without asking for a quantization method (those of Mamba's first version) are decoded to plain weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.linear import decode
from ...spec.linear import PackedLinear, Spec
from ...support.errors import CheckpointError, ConfigError
from .experts import DecodedExpertsMethod, PackedExpertsMethod

#: vLLM shows what loggers below its own say.
LOGGER = logging.getLogger("vllm.pairquant")


def passed_on(
    weights: Iterable[tuple[str, Tensor]],
    methods: Sequence[Any],
    plain: Mapping[str, Spec],
    dtype: torch.dtype,
    homeless: Collection[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that vLLM's model is to place itself: those that are not ours, decoded weights, and packed linears.

    weights: of the checkpoint; methods: of the model's layers; plain: path in the checkpoint → what is packed there but wanted
    as a plain weight of this dtype; homeless: paths in the checkpoint of output embeddings that the model does without.
    Raises `CheckpointError` naming a linear to decode of which a tensor is missing or damaged, `ConfigError` for one that rounds
    what it reads.
    """
    experts: dict[str, Callable[[Tensor], None]] = {}
    for method in methods:
        if isinstance(method, PackedExpertsMethod | DecodedExpertsMethod):
            experts |= method.arrivals.doors()
    decoding = _Decoding(plain, dtype)
    if homeless:
        LOGGER.warning(
            "%s is quantized, but vLLM's model has no output embedding of its own: the input embedding runs in its place, in 16 bits",
            min(homeless),
        )
    for name, tensor in weights:
        if name.rpartition(".")[0] in homeless:
            continue
        if name in experts:
            experts[name](tensor)
        elif (path := name.rpartition(".")[0]) in plain:
            yield from decoding.take(path, name, tensor)
        else:
            yield name, tensor
    decoding.finish()


class _Decoding:
    """The packed linears whose weights vLLM's model wants plain, until all of their tensors have come."""

    def __init__(self, specs: Mapping[str, Spec], dtype: torch.dtype):
        self.specs, self.dtype = specs, dtype
        self.device = torch.empty(0).device  # vLLM loads in the context of the device that the weights lie on
        self.arrived: dict[str, dict[str, Tensor]] = {}
        for path, spec in specs.items():
            if spec.activations is not None:  # a plain weight in vLLM's own layer, which rounds nothing
                raise ConfigError(
                    f"{path} rounds what it reads to {spec.activations}, but vLLM runs it without a quantization method, which "
                    "rounds nothing. Run the model with Transformers, or quantize it without --activations."
                )
        if specs:
            LOGGER.warning(
                "%d packed linears (such as %s) are decoded on loading, because vLLM runs them without a quantization "
                "method: they take as much memory as in the unquantized model",
                len(specs),
                min(specs),
            )

    def take(self, path: str, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Take in one tensor; yield the weight once nothing is missing, and what a plain linear has too."""
        field = name.rpartition(".")[2]
        if field == "bias":
            yield name, tensor
            return
        mine = self.arrived.setdefault(path, {})
        mine[field] = tensor
        if "qweight" not in mine:
            return
        layout = self.specs[path].layout_around(mine["qweight"])
        if set(mine) >= set(layout.fields()):
            packed = PackedLinear.from_tensors(path, layout, mine)
            del self.arrived[path]
            yield f"{path}.weight", decode(packed.to(self.device)).to(self.dtype)

    def finish(self) -> None:
        """Raise `CheckpointError` if a linear lacks a tensor."""
        for path, tensors in self.arrived.items():
            raise CheckpointError(f"{path} has only {', '.join(sorted(tensors))}: the checkpoint is damaged.")
