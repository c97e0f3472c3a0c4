"""The walk over the decoder blocks: each is fitted on what the quantized blocks before it hand over.

Per block: one pass of the calibration text collects the second moments of every distinct input; the transforms are
fitted, the weights rounded, packed, and replaced by their decoded values; a second pass carries the text on. Recipes
with block-wise training do it in place of the proxy, or after it. Blocks that an earlier run finished are taken as
they are.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.linear import Transform, decode, encode
from ..core.rounding import proxy_error, proxy_terms, ratio
from ..kernels.fit.loops import solvers
from ..models.blocks import Block, find_blocks
from ..spec.linear import LinearLayout, PackedLinear, columns_per_block
from ..spec.options import QuantConfig
from ..support.errors import ConfigError
from .blockwise import BlockData, refit_block, train_block
from .drift import drift_targets
from .moments import Moments, MomentSum
from .ranks import Ranks
from .search import Problem, fit_transforms
from .streams import Streams


@dataclass
class BlockResult:
    """One finished block. packed and errors by linear path; errors are relative output errors (`proxy_error`).

    shared: groups of linears with one transform; parameters: other parameters of the block that were trained, by path;
    history: what block-wise training reported; gpu_peak: most GPU memory allocated so far, bytes.
    """

    index: int
    path: str
    packed: dict[str, PackedLinear] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    shared: list[tuple[str, ...]] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    gpu_peak: int = 0


class Home(Protocol):
    """Where blocks are when they are not worked on."""

    def dtype(self, block: Block) -> torch.dtype: ...
    def enter(self, block: Block, device: torch.device, dtype: torch.dtype) -> None: ...
    def expect(self, block: Block, device: torch.device) -> None: ...
    def leave(self, block: Block) -> None: ...


class Finished(Protocol):
    """What an earlier run left: results of the first `count` blocks, and perhaps the streams entering a later one."""

    @property
    def count(self) -> int: ...
    def result(self, index: int) -> BlockResult: ...
    def snapshot(self) -> tuple[int, dict[str, Tensor]] | None: ...


class InPlace:
    """The model holds all its weights; a block goes to the device and comes back."""

    stored_as: tuple[torch.device, torch.dtype] | None = None

    def dtype(self, block: Block) -> torch.dtype:
        return self.stored_as[1] if self.stored_as else next(block.module.parameters()).dtype

    def enter(self, block: Block, device: torch.device, dtype: torch.dtype) -> None:
        first = next(block.module.parameters())
        self.stored_as = first.device, first.dtype
        block.module.to(device, dtype)

    def expect(self, block: Block, device: torch.device) -> None:
        """It is here already."""

    def leave(self, block: Block) -> None:
        assert self.stored_as is not None, "a block leaves that never entered"
        block.module.to(*self.stored_as)
        self.stored_as = None


class Nothing:
    """No earlier run."""

    count = 0

    def result(self, index: int) -> BlockResult:
        raise IndexError(index)

    def snapshot(self) -> None:
        return None


@dataclass
class Walk:
    """What a walk works with. tokens, validation: int64 [windows, T], this rank's share; None where not needed.

    store: where the hidden states are kept between blocks, if not on the device.
    kept: called after each block with its index and the streams that enter the next one.
    """

    model: nn.Module
    config: QuantConfig
    device: torch.device
    tokens: Tensor | None = None
    validation: Tensor | None = None
    home: Home = field(default_factory=InPlace)
    finished: Finished = field(default_factory=Nothing)
    ranks: Ranks = field(default_factory=Ranks)
    store: torch.device | None = None
    notice: Callable[[str], None] = lambda text: None
    kept: Callable[[int, Streams], None] = lambda index, streams: None

    def __post_init__(self) -> None:
        self.blocks = find_blocks(self.model, self.config.ignore)
        self.dtype = compute_dtype(self.model, self.config, self.device)

    @torch.no_grad()
    def run(self) -> Iterator[BlockResult]:
        """Quantize block after block: after each yield the block holds its decoded weights."""
        streams = self._start(self.tokens) if needs_text(self.config) else None
        held_out = self._start(self.validation) if self.validation is not None and len(self.validation) else None
        first = self._restore(streams) if held_out is None else 0
        for index, block in enumerate(self.blocks):
            if index < self.finished.count:
                result = self.finished.result(index)
                if streams is not None and index >= first:
                    with self._entered(index):
                        self._repeat(block, index, result, [s for s in (streams, held_out) if s])
                continue
            with self._entered(index):
                yield self._quantize(index, block, streams, held_out)
                if streams is not None and index + 1 < len(self.blocks):
                    for stream in filter(None, (streams, held_out)):
                        stream.advance(block, index)
                    self.kept(index, streams)

    def _start(self, tokens: Tensor | None) -> Streams:
        if tokens is None:
            raise ConfigError(f"preset {self.config.preset!r} needs calibration tokens, none were given")
        keep = compares(self.config)
        store = self.store or self.device
        return Streams.start(self.model, self.blocks, tokens, keep, self.device, store, self.dtype, self.notice)

    def _restore(self, streams: Streams | None) -> int:
        """The first block that the streams have yet to enter."""
        stored = self.finished.snapshot() if streams is not None and self.finished.count else None
        if stored is None or streams is None:
            return 0
        streams.restore(stored[1])
        return stored[0]

    @contextmanager
    def _entered(self, index: int) -> Iterator[None]:
        block = self.blocks[index]
        self.home.enter(block, self.device, self.dtype)
        if index + 1 < len(self.blocks):
            self.home.expect(self.blocks[index + 1], self.device)
        try:
            yield
        finally:
            self.home.leave(block)

    def _repeat(self, block: Block, index: int, result: BlockResult, streams: list[Streams]) -> None:
        """Carry the streams through a block that is finished already, as if it had been worked on now."""
        for stream in streams:
            stream.advance_original(block, index)
        for path, packed in result.packed.items():
            install(block.linears[path], packed, self.device)
        for path, value in result.parameters.items():
            parameter = block.module.get_parameter(path.removeprefix(f"{block.path}."))
            parameter.data = value.to(parameter.device, parameter.dtype)
        for stream in streams:
            stream.advance(block, index)

    def _quantize(self, index: int, block: Block, streams: Streams | None, held_out: Streams | None) -> BlockResult:
        start = time.perf_counter()
        result = BlockResult(index, block.path)
        before = _other_parameters(block)
        moments = self._moments(index, block, streams)
        if held_out is not None:
            held_out.advance_original(block, index)
        groups = _groups(moments, self.config.share_rotations)
        result.shared = [group for group in groups if len(group) > 1]
        recipe = self.config.recipe
        blockwise = streams is not None and groups and (recipe.training or recipe.refit)
        trained = [path for group in groups for path in group] if blockwise else []
        weights = {path: block.linears[path].weight.detach().float() for path in trained}
        if recipe.training is None:
            self._fit_and_round(block, moments, groups, result)
        if blockwise:
            assert streams is not None, "block-wise training has text"
            data = _block_data(streams, held_out, self.config, self.ranks)
            if recipe.training:
                seeds = {group[0]: _seed(self.config.seed, group[0]) for group in groups}
                call = streams.calls[index]
                result.packed = train_block(
                    block, call, data, self.config, groups, seeds, result.history.append, self.ranks
                )
            else:
                result.packed = refit_block(
                    block, streams.calls[index], data, result.packed, groups, self.config, result.history.append,
                    self.home.dtype(block), self.ranks,
                )  # fmt: skip
            hessians = {path: m.hessian for m in moments for path in m.readers}
            for path, weight in weights.items():
                decoded = block.linears[path].weight.float()
                result.errors[path] = proxy_error(weight, decoded, hessians[path])
        result.packed = _on_cpu(result.packed, self.device)
        after = _other_parameters(block)
        result.parameters = {path: value.cpu() for path, value in after.items() if not torch.equal(value, before[path])}
        result.seconds = time.perf_counter() - start
        if self.device.type == "cuda":
            result.gpu_peak = torch.cuda.max_memory_allocated(self.device)
        return result

    def _moments(self, index: int, block: Block, streams: Streams | None) -> list[Moments]:
        if streams is None:
            eye = {c: torch.eye(c, device=self.device) for c in {m.in_features for m in block.linears.values()}}
            return [Moments([path], eye[linear.in_features]) for path, linear in block.linears.items()]
        total = streams.moments(block, index)
        _add_over_ranks(total, self.ranks)
        return total.checked(block.linears)

    def _fit_and_round(
        self, block: Block, moments: list[Moments], groups: list[tuple[str, ...]], result: BlockResult
    ) -> None:
        """Fit, round and replace all linears of the block; this rank fits on its rows of each."""
        targets = {}
        for m in moments:
            weights = {path: self._rows(block.linears[path]).float() for path in m.readers}
            targets.update(drift_targets(weights, m, self.config.recipe.drift, self.ranks))
            m.cross = None
        hessians = {path: m.hessian for m in moments for path in m.readers}
        problems = [
            Problem(_stacked([targets[p] for p in group]), hessians[group[0]], _seed(self.config.seed, group[0]))
            for group in groups
        ]
        transforms = fit_transforms(problems, self.config, self.ranks)
        del problems
        of_linear = {path: t for group, t in zip(groups, transforms, strict=True) for path in group}
        self._round(block, targets, of_linear, hessians, result)

    def _round(
        self,
        block: Block,
        targets: dict[str, Tensor],
        transforms: dict[str, Transform],
        hessians: dict[str, Tensor],
        result: BlockResult,
    ) -> None:
        """Round and replace all linears; this rank rounds some, and gets the others. targets: its rows of each."""
        ranks, linears = self.ranks, {path: block.linears[path] for path in transforms}
        owners = ranks.dealt({p: m.in_features * (m.in_features + m.out_features) for p, m in linears.items()})
        whole = {
            path: ranks.collected(targets.pop(path), linear.out_features, self._unit, owners[path])
            for path, linear in linears.items()
        }
        terms = torch.zeros(len(linears), 2, device=self.device)
        packed: dict[str, PackedLinear] = {}
        for i, (path, linear) in enumerate(linears.items()):
            if (target := whole.pop(path)) is not None:
                bias = None if linear.bias is None else linear.bias.detach()
                packed[path] = encode(
                    target, transforms[path], hessians[path], self._layout(linear), self.config.recipe,
                    self.config.symmetric, bias, solvers=solvers(self.device),
                )  # fmt: skip
                terms[i] = proxy_terms(linear.weight.detach().float(), decode(packed[path]), hessians[path])
        ranks.add(terms)
        for (path, linear), pair in zip(linears.items(), terms, strict=True):
            everywhere = ranks.shared(packed.pop(path, None), self._layout(linear), owners[path], self.device)
            install(linear, everywhere, self.device)
            result.packed[path], result.errors[path] = everywhere, ratio(pair)

    def _layout(self, linear: nn.Linear) -> LinearLayout:
        return self.config.layout(linear.in_features, linear.out_features, linear.bias is not None)

    def _rows(self, linear: nn.Linear) -> Tensor:
        """This rank's rows of a linear's weight."""
        return linear.weight.detach()[self.ranks.rows(linear.out_features, self._unit)]

    @property
    def _unit(self) -> int:
        """Rows are shared out in multiples of this."""
        return columns_per_block(self.config.bits)


def quantize_blocks(
    model: nn.Module, tokens: Tensor | None, config: QuantConfig, device: torch.device
) -> Iterator[BlockResult]:
    """Quantize a model in memory, in place. tokens: int64 [samples, T], not needed by `needs_text`-less recipes."""
    yield from Walk(model, config, device, tokens).run()


def needs_text(config: QuantConfig) -> bool:
    """Whether the recipe looks at activations at all."""
    recipe = config.recipe
    return recipe.transform or recipe.rounding != "nearest" or recipe.training is not None or recipe.refit is not None


def compares(config: QuantConfig) -> bool:
    """Whether the recipe looks at the original model's activations as well."""
    return config.recipe.drift > 0 or config.recipe.training is not None or config.recipe.refit is not None


def install(linear: nn.Linear, packed: PackedLinear, device: torch.device) -> None:
    """Give the linear the weight that its packed form stands for."""
    on_device = PackedLinear(packed.layout, **{name: t.to(device) for name, t in packed.tensors().items()})
    linear.weight.data = decode(on_device).to(linear.weight.dtype)


def compute_dtype(model: nn.Module, config: QuantConfig, device: torch.device) -> torch.dtype:
    """Of the forward passes: bfloat16 where the model is and the device multiplies it fast, else float32."""
    if config.compute != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.compute]
    stored = {linear.weight.dtype for block in find_blocks(model, config.ignore) for linear in block.linears.values()}
    return torch.bfloat16 if device.type == "cuda" and stored == {torch.bfloat16} else torch.float32


def _groups(moments: list[Moments], shared: bool) -> list[tuple[str, ...]]:
    """The linears of each transform."""
    return [tuple(m.readers) for m in moments] if shared else [(path,) for m in moments for path in m.readers]


def _stacked(weights: list[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def _add_over_ranks(total: MomentSum, ranks: Ranks) -> None:
    for moments in total.moments:
        ranks.add(moments.hessian)
        if moments.cross is not None:
            ranks.add(moments.cross)


def _block_data(streams: Streams, held_out: Streams | None, config: QuantConfig, ranks: Ranks) -> BlockData:
    """After `moments` the original stream holds the block's outputs; the quantized one still enters it."""
    how = config.recipe.training or config.recipe.refit
    assert streams.original is not None, "block-wise training compares with the original stream"
    assert how is not None, "asked for by the recipe"
    lists = [streams.quantized, streams.original]
    lists += [held_out.quantized, held_out.original or []] if held_out else [[], []]
    limit = min(max(1, how.batch // ranks.size), streams.calls[0].batch)
    return BlockData(*(_even(stream, limit) for stream in lists))


def _even(stream: list[Tensor], limit: int) -> list[Tensor]:
    """The stream in micro-batches of one size, of at most `limit` windows."""
    sizes = {len(hidden) for hidden in stream}
    if not sizes or (len(sizes) == 1 and max(sizes) <= limit):
        return stream
    windows = sum(len(hidden) for hidden in stream)
    size = max(n for n in range(1, min(limit, max(sizes)) + 1) if windows % n == 0)
    return list(torch.cat(stream).split(size))


def _other_parameters(block: Block) -> dict[str, Tensor]:
    """Every parameter that is not a quantized linear's, by full path."""
    linears = set(map(id, block.linears.values()))
    return {
        f"{block.path}.{path}.{name}" if path else f"{block.path}.{name}": parameter.detach().clone()
        for path, module in block.module.named_modules()
        if id(module) not in linears
        for name, parameter in module.named_parameters(recurse=False)
    }


def _on_cpu(packed: dict[str, PackedLinear], device: torch.device) -> dict[str, PackedLinear]:
    """The linears' tensors in host memory, from a GPU all copied at once into pinned pages."""
    there = {
        path: PackedLinear(linear.layout, **{n: t.to("cpu", non_blocking=True) for n, t in linear.tensors().items()})
        for path, linear in packed.items()
    }
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return there


def _seed(seed: int, path: str) -> int:
    """A seed of its own for every transform, the same whatever was quantized before."""
    return (seed * 1_000_003 + zlib.crc32(path.encode())) % 2**63
