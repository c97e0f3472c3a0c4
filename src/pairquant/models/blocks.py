"""Where a model's decoder blocks are, what each block is called with, and what its linears read.

Everything is found by looking, never by class name: the blocks are the `nn.ModuleList` that holds most of the model's
linear weights; linears that are handed the very same tensor in one forward pass read the same input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..spec.patterns import matches
from ..support.errors import SourceError


@dataclass(frozen=True)
class Block:
    """One decoder block, its path, and the linears to quantize in it: full path → module."""

    path: str
    module: nn.Module
    linears: dict[str, nn.Linear]


@dataclass
class Call:
    """What a block receives besides hidden states (masks, position embeddings), for micro-batches of `batch` windows.

    Windows are all whole, so what one of them needs is what every other needs.
    """

    args: tuple
    kwargs: dict
    batch: int

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """hidden: [B, T, H] → [B, T, H], for B up to `batch`."""
        args, kwargs = self.args, self.kwargs
        if hidden.shape[0] < self.batch:
            args, kwargs = self._first(args, hidden.shape[0]), self._first(kwargs, hidden.shape[0])
        output = block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def to(self, device: torch.device, dtype: torch.dtype) -> Call:
        """The same with all tensors on `device`, floating ones in `dtype`."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, dtype) if x.is_floating_point() else x.to(device)

        return Call(_map_tensors(self.args, move), _map_tensors(self.kwargs, move), self.batch)

    def _first(self, value: Any, count: int) -> Any:
        return _map_tensors(value, lambda x: x[:count] if x.dim() and x.shape[0] == self.batch else x)


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_map_tensors(item, change) for item in value)
    return value


def find_blocks(model: nn.Module, ignore: tuple[str, ...] = ()) -> list[Block]:
    """The decoder blocks in order; raises `SourceError` when there are none with linears."""
    stacks = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    weights = {path: _linear_parameters(m) for path, m in stacks}
    if not any(weights.values()):
        raise SourceError(
            f"{type(model).__name__} has no list of blocks with nn.Linear layers: nothing to quantize. "
            "Decoder-only Transformers models are supported."
        )
    path, stack = max(stacks, key=lambda item: weights[item[0]])
    return [
        Block(
            f"{path}.{i}", block, {name: m for name, m in _linears(block, f"{path}.{i}") if not matches(name, ignore)}
        )
        for i, block in enumerate(stack)
    ]


def _linears(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Linear]]:
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            yield f"{prefix}.{name}", child


def _linear_parameters(module: nn.Module) -> int:
    return sum(linear.weight.numel() for _, linear in _linears(module, ""))


class _Stop(Exception):
    """Ends a forward pass once the last block has been reached."""


@torch.no_grad()
def first_inputs_and_calls(
    model: nn.Module, blocks: list[Block], tokens: Tensor, micro_batch: int
) -> tuple[list[Tensor], list[Call]]:
    """Hidden states that enter the first block, one [B, T, H] per micro-batch, and each block's `Call`.

    tokens: int64 [samples, T]. The blocks themselves are skipped: what they are called with does not depend on their
    outputs; their weights may be absent.
    """
    hidden: list[Tensor] = []
    calls: dict[int, Call] = {}

    def skip(index: int, last: bool):
        def forward(states: Tensor, *args, **kwargs):
            if index == 0:
                hidden.append(states.detach())
            calls.setdefault(index, Call(args, kwargs, states.shape[0]))
            if last:
                raise _Stop
            return states

        return forward

    try:
        for i, block in enumerate(blocks):
            block.module.forward = skip(i, last=i == len(blocks) - 1)
        for batch in tokens.split(micro_batch):
            with suppress(_Stop):
                model(input_ids=batch, use_cache=False)
    finally:
        for block in blocks:
            del block.module.forward
    return hidden, [calls[i] for i in range(len(blocks))]
