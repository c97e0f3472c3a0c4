"""Find a model's decoder blocks, and the arguments that each block is called with.

The names of classes play no part: the blocks are the entries of the `nn.ModuleList` that holds most linear weights, in the
part of the model that the input embedding is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..spec.patterns import matches
from ..support.errors import ConfigError, SourceError
from .calls import HANDED, Call, Recording, linked, window_axis
from .names import OWN, Names
from .sites import Site, embedding_of, site_of, sites_in

T = TypeVar("T")
#: What a model raises if its blocks return something else than it expects, or a weight is absent.
FAILURES = (ValueError, IndexError, TypeError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class Block:
    """One decoder block, its path, and the weights to quantize in it, by path.

    head: whether it is no decoder block but the output embedding, which is quantized after them (`head_block`).
    """

    path: str
    module: nn.Module
    sites: dict[str, Site]
    head: bool = False


def find_blocks(model: nn.Module, ignore: tuple[str, ...] = (), names: Names = OWN) -> list[Block]:
    """Return the decoder blocks in order, each with the sites that `ignore` does not name, by their source's names.

    Raises `SourceError` if there are no blocks with linear layers, and if the same block occurs at several places.
    """
    stacks = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    weights = {path: sum(site.weight.numel() for site in sites_in(m)) for path, m in stacks}
    stacks = _beside_embedding(model, [stack for stack in stacks if weights[stack[0]]])
    if not stacks:
        raise SourceError(
            f"{type(model).__name__} has no list of blocks with linear layers: nothing to quantize. "
            "Decoder-only Transformers models are supported."
        )
    path, stack = max(stacks, key=lambda item: weights[item[0]])
    _require_distinct(path, stack)
    return [
        Block(
            f"{path}.{i}",
            block,
            {site.path: site for site in sites_in(block, f"{path}.{i}", names) if not matches(site.path, ignore)},
        )
        for i, block in enumerate(stack)
    ]


def _beside_embedding(model: nn.Module, stacks: list[tuple[str, nn.ModuleList]]) -> list[tuple[str, nn.ModuleList]]:
    """Return the stacks in the smallest part of the model that has the input embedding too: towers for images may be larger."""
    embedding = embedding_of(model, "input")
    place = next((path for path, module in model.named_modules() if module is embedding), "")
    while place:
        place = place.rpartition(".")[0]
        if near := [(path, m) for path, m in stacks if path.startswith(f"{place}." if place else "")]:
            return near
    return stacks


def head_block(model: nn.Module, names: Names = OWN) -> Block:
    """Return the output embedding as a block of one site. If it shares its weight with the input embedding, no longer.

    Raises `ConfigError` for a model whose output embedding is no plain linear layer.
    """
    head = embedding_of(model, "output")
    place = next((path for path, module in model.named_modules() if module is head), "")
    site = site_of(place, head, names) if isinstance(head, nn.Module) else None
    if site is None or not place:
        kind = "no output embedding" if head is None else f"an output embedding of the class {type(head).__name__}"
        raise ConfigError(f"{type(model).__name__} has {kind}, which cannot be quantized. Leave --head-bits out.")
    embedding, weight = embedding_of(model, "input"), site.module.get_parameter("weight")
    if embedding is not None and embedding.weight is weight:
        site.module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return Block(place, site.module, {site.path: site}, head=True)


def _require_distinct(path: str, stack: nn.ModuleList) -> None:
    first: dict[int, int] = {}
    for i, block in enumerate(stack):
        if id(block) in first:
            raise SourceError(
                f"{path}.{first[id(block)]} and {path}.{i} are the same block. Blocks that share their weights cannot be "
                "quantized one after the other: give each place a copy of its own (copy.deepcopy) in the model's code."
            )
        first[id(block)] = i


class _Stop(Exception):
    """Raised to end a forward pass when all that is needed of it has been recorded."""


@dataclass
class Entry:
    """What the blocks receive for the calibration text.

    hidden: the hidden states that enter the first block, [B, T, H] for each micro-batch; calls: the other arguments of
    each block; passes: how many times a forward pass runs through all blocks, more than once in looped decoders.
    """

    hidden: list[Tensor]
    calls: list[Call]
    passes: int


def enter(model: nn.Module, blocks: list[Block], tokens: Tensor, micro_batch: int) -> Entry:
    """Run the part of the model before the blocks, and record what enters the blocks. tokens: int64 [samples, T].

    The blocks themselves are skipped: what they are called with does not depend on their outputs; their weights may be
    absent, and those of the output embedding. Whether a block returns its states alone or first in a tuple, and of how many, is
    tried out.
    """
    return _either_way(lambda returned: _entered(model, blocks, tokens, micro_batch, returned))


@torch.no_grad()
def _entered(
    model: nn.Module, blocks: list[Block], tokens: Tensor, micro_batch: int, returned: Callable[[Tensor], Any]
) -> Entry:
    """Do what `enter` does, with blocks that return what `returned` makes of the states."""
    hidden: list[Tensor] = []
    calls: dict[int, Recording] = {}
    runs = [0] * len(blocks)

    def skip(index: int) -> Callable[..., Any]:
        def forward(states: Tensor, *args: Any, **kwargs: Any) -> Any:
            runs[index] += 1
            axis = window_axis(states, batch)
            if index == 0 and len(hidden) < batches:
                hidden.append(states.detach().transpose(0, axis))
            if index not in calls:
                calls[index] = Recording(args, kwargs, len(batch), axis)
            elif calls[index].micro_batches < batches:
                calls[index].add(args, kwargs, len(batch))
            if index == len(blocks) - 1 and batches > 1:
                raise _Stop  # the first micro-batch goes on, to count the passes
            return returned(states)

        return forward

    def stop(*_: Any) -> None:
        raise _Stop

    head = embedding_of(model, "output")
    handle = head.register_forward_pre_hook(stop) if head is not None else None
    batches, passes = 0, 1
    try:
        for i, block in enumerate(blocks):
            block.module.forward = skip(i)  # type: ignore[method-assign]
        for batch in tokens.split(micro_batch):
            batches += 1
            with suppress(_Stop):
                model(input_ids=batch, use_cache=False)
            passes = runs[0] if batches == 1 else passes
    finally:
        for block in blocks:
            del block.module.forward
        if handle is not None:
            handle.remove()
    return Entry(hidden, linked([calls[i].call(block.path, i) for i, block in enumerate(blocks)]), passes)


def run_from(model: nn.Module, blocks: list[Block], tokens: Tensor, states: Tensor | None) -> Tensor:
    """Run the part of the model after the blocks, as if the last one had returned `states`; differentiable.

    tokens: int64 [B, T]; states: [B, T, H], None for those that entered the blocks. Returns the logits, [B, T, vocabulary].
    The blocks themselves are skipped: their weights may be absent.
    """

    def attempt(returned: Callable[[Tensor], Any]) -> Tensor:
        def skip(given: Tensor, *_: Any, **__: Any) -> Any:
            return returned(given if states is None else states.transpose(0, window_axis(given, tokens)))

        try:
            for block in blocks:
                block.module.forward = skip  # type: ignore[method-assign]
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        finally:
            for block in blocks:
                del block.module.forward
        if logits.shape[:2] != tokens.shape:
            raise ValueError(f"the model returns logits of shape {list(logits.shape)}")
        return logits

    return _either_way(attempt)


def read_by_head(model: nn.Module, blocks: list[Block], states: Tensor) -> Tensor:
    """Return what the output embedding reads, [B, T, H], if the last block returns `states`, [B, T, H].

    The output embedding itself is not run: its weight may be absent. Raises `ConfigError` for a model that does not call it.
    """
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise _Stop

    head = embedding_of(model, "output")
    assert head is not None, "asked for by a block of its own"
    handle = head.register_forward_pre_hook(stop)
    tokens = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)  # their states are not used
    failure: Exception | None = None
    try:
        with suppress(_Stop):
            run_from(model, blocks, tokens, states)
    except FAILURES as error:  # the weight that it uses instead may be absent
        if isinstance(error, torch.OutOfMemoryError):
            raise
        failure = error
    finally:
        handle.remove()
    if not found:
        raise ConfigError(
            f"{type(model).__name__} does not call its output embedding, so that no other layer can take its place. Leave "
            "--head-bits out."
        ) from failure
    return found[0]


def after_head(model: nn.Module, blocks: list[Block], logits: Tensor) -> Tensor:
    """Return what the model makes of the logits of its output embedding, both [n, vocabulary]; differentiable.

    Most models return them as they are; some cap or divide them. blocks: without the output embedding; the weights of all of
    them may be absent.
    """
    head = embedding_of(model, "output")
    assert head is not None, "asked for by a block of its own"
    tokens = torch.zeros(len(logits), 1, dtype=torch.int64, device=logits.device)
    head.forward = lambda _: logits[:, None]  # type: ignore[method-assign]
    try:
        return run_from(model, blocks, tokens, None)[:, 0]
    finally:
        del head.forward


def outside(model: nn.Module, blocks: Sequence[Block]) -> list[Tensor]:
    """Return the parameters and buffers outside the blocks."""
    inside = {id(module) for block in blocks for module in block.module.modules()}
    return [
        tensor
        for module in model.modules()
        if id(module) not in inside
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]


@contextmanager
def outside_on(device: torch.device, dtype: torch.dtype, model: nn.Module, blocks: Sequence[Block]) -> Iterator[None]:
    """Move everything outside the blocks to a device, floating tensors in this dtype, for as long as the context is open."""
    tensors = [tensor for tensor in outside(model, blocks) if not tensor.is_meta]
    home = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        yield
    finally:
        for tensor, data in zip(tensors, home, strict=True):
            tensor.data = data


def _either_way(attempt: Callable[[Callable[[Tensor], Any]], T]) -> T:
    """Return what `attempt` makes of a way in which blocks may return their states: alone, or else first of two or three.

    What comes second may be given to the next block (`Handed`).
    """
    first: Exception | None = None
    for others in ((), (HANDED,), (None,), (HANDED, None), (None, None)):
        try:
            return attempt(lambda states, others=others: (states, *others) if others else states)  # type: ignore[misc]
        except FAILURES as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            first = first or error
    assert first is not None, "both ways have failed"
    raise first
