"""Where a model's decoder blocks are, what each block is called with, and what its linears read.

Everything is found by looking, never by class name: the blocks are the `nn.ModuleList` that holds most of the model's
linear weights; linears that are handed the very same tensor in one forward pass read the same input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import matches
from ..errors import CalibrationError, ConfigError, SourceError


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


@dataclass
class Inputs:
    """The distinct inputs of a block's linears in one forward pass.

    readers[n]: paths of the linears that read tensors[n], float [tokens, C].
    """

    tensors: list[Tensor] = field(default_factory=list)
    readers: list[list[str]] = field(default_factory=list)


@contextmanager
def recorded_inputs(linears: dict[str, nn.Linear]) -> Iterator[Inputs]:
    """Collect what each of `linears` reads while the context is open."""
    inputs = Inputs()
    originals: list[Tensor] = []

    def hook(path: str):
        def record(module: nn.Module, args: tuple) -> None:
            for i, seen in enumerate(originals):
                if seen is args[0]:
                    inputs.readers[i].append(path)
                    return
            originals.append(args[0])
            inputs.tensors.append(args[0].detach().flatten(0, -2))
            inputs.readers.append([path])

        return record

    handles = [linear.register_forward_pre_hook(hook(path)) for path, linear in linears.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Moments:
    """Second moments of one distinct input. hessian: XᵀX [C, C] float32; cross: X₀ᵀX, X₀ of the original model."""

    readers: list[str]
    hessian: Tensor
    cross: Tensor | None = None


class MomentSum:
    """Adds up `Moments` over micro-batches."""

    def __init__(self) -> None:
        self.moments: list[Moments] = []

    def add(self, inputs: Inputs, originals: Inputs | None = None) -> None:
        """Add one micro-batch; `originals` are the same linears' inputs in the original model."""
        if not self.moments:
            self.moments = [
                Moments(readers, _zeros(x), _zeros(x) if originals else None)
                for readers, x in zip(inputs.readers, inputs.tensors, strict=True)
            ]
        # All products first: running out of memory then leaves the sums as they were.
        products = [second_moment(x, x) for x in inputs.tensors]
        crossed = (
            [second_moment(x, y) for x, y in zip(originals.tensors, inputs.tensors, strict=True)] if originals else []
        )
        for moments, product in zip(self.moments, products, strict=True):
            moments.hessian += product
        for moments, product in zip(self.moments, crossed):  # noqa: B905  (empty without originals)
            if moments.cross is not None:
                moments.cross += product

    def checked(self, linears: dict[str, nn.Linear]) -> list[Moments]:
        """The sums; refuses linears that never ran, ran twice, or saw values that are not finite."""
        read = [path for moments in self.moments for path in moments.readers]
        for path in linears:
            if read.count(path) != 1:
                raise ConfigError(f"{path} runs {read.count(path)} times in a forward pass, must be once: --ignore it")
        for moments in self.moments:
            if not moments.hessian.isfinite().all():
                raise CalibrationError(
                    f"the inputs of {', '.join(moments.readers)} are not finite on the calibration text. "
                    "Check the source model, or load it in a wider dtype."
                )
        return self.moments


def second_moment(x: Tensor, y: Tensor) -> Tensor:
    """XᵀY of [tokens, C] activations, float32 [C, C], summed in float32.

    16-bit inputs go to CUDA's tensor cores as they are, where their products are exact; never through TF32.
    """
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x.T, y, out_dtype=torch.float32)
    return x.float().T @ y.float()


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float32, device=x.device)
