"""The walk over the decoder blocks: each is fitted on what the quantized blocks before it hand over.

Per block, in this order: the calibration text runs through the block as it was, which sums the second moments of every
distinct input and moves the original model's stream on; the strategy of the recipe fits, rounds and packs the linears
and leaves the block with its decoded weights; the quantized model's stream moves on. Blocks that an earlier run
finished are taken as they are.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.linear import decode
from ..models.blocks import Block, after_head, outside_on, read_by_head
from ..models.planning import plan_model
from ..models.rounded_inputs import InputRounding, Undo, round_inputs, roundings_of
from ..models.sharing import fold_shared, lenders_of, settle_scales
from ..spec.linear import PackedLinear
from ..spec.options import QuantConfig
from ..spec.plan import Plan
from ..support.errors import ConfigError
from .blockwise import BlockData
from .finished import BlockResult, Finished, Nothing
from .head import HeadStrategy, HeadText
from .homes import Home, InPlace
from .loans import Loans
from .moments import Moments, MomentSum, Pool, pooled
from .noise import SAMPLED_TOKENS, RoundedMoments
from .ranks import Ranks
from .stages import Groups, Layouts
from .strategies import BlockWork, Rounding, Strategy, strategy_for
from .streams import Places, Streams

#: The share of the earlier layers' error that the output embedding corrects, where the recipe corrects any.
HEAD_DRIFT = 0.5


@dataclass
class Walk:
    """What a walk works with. tokens, validation: int64 [windows, T], this rank's share; None where not needed.

    store: where the hidden states are kept between blocks, if not on the device.
    kept: called after each block with its index and the streams that enter the next one. embedding: the decoded weight of
    a quantized input embedding.
    """

    model: nn.Module
    blocks: list[Block]
    plan: Plan
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
    embedding: Tensor | None = None

    def __post_init__(self) -> None:
        self.dtype = compute_dtype(self.blocks, self.config, self.device)
        self.loans = Loans(self.blocks)
        self._rounds = Undo()

    @torch.no_grad()
    def run(self) -> Iterator[BlockResult]:
        """Quantize block after block: after each yield the block holds its decoded weights."""
        streams = self._start(self.tokens) if self.config.recipe.needs_text else None
        held_out = self._start(self.validation) if self.validation is not None and len(self.validation) else None
        first = self._restore(streams) if held_out is None else 0
        for index, block in enumerate(self.blocks):
            if block.head:
                for stream in filter(None, (streams, held_out)):
                    stream.enter_head(self.model, self.blocks[:index])
            if index < self.finished.count:
                result = self.finished.result(index)
                if streams is not None and (index >= first or self.loans.lends(block)):
                    with self._entered(index):
                        self._repeat(block, index, result, [s for s in (streams, held_out) if s and index >= first])
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
        places = Places(self.device, self.store or self.device, self.dtype)
        decoders = [block for block in self.blocks if not block.head]
        compares = self.config.recipe.compares
        streams = Streams.start(self.model, decoders, tokens, compares, places, self.notice, self.embedding)
        if self.config.recipe.end_to_end is not None:
            _require_separate(self.model, decoders, streams)
        if self.blocks[-1].head:  # a model that cannot do with a quantized head is refused now, not after hours
            with outside_on(self.device, self.dtype, self.model, decoders):
                read_by_head(self.model, decoders, streams.quantized[0][:1].to(self.device))
        return streams

    def _restore(self, streams: Streams | None) -> int:
        """Return the first block that the streams have yet to enter."""
        stored = self.finished.snapshot() if streams is not None and self.finished.count else None
        if stored is None or streams is None or any(call.carries for call in streams.calls):
            return 0  # what blocks hand each other is not stored
        streams.restore(stored[1])
        return stored[0]

    @contextmanager
    def _entered(self, index: int) -> Iterator[None]:
        block = self.blocks[index]
        self.home.enter(block, self.device, self.dtype)
        if index + 1 < len(self.blocks):
            self.home.expect(self.blocks[index + 1], self.device)
        try:
            self.loans.remember(block, settled=False)
            self.loans.put(block, settled=False)
            yield
            self.loans.remember(block, settled=True)
            self.loans.put(block, settled=True)
        finally:
            self.home.leave(block)
            if not self.home.stays:
                self._rounds()

    def _round_inputs(self, block: Block, packed: Mapping[str, PackedLinear]) -> None:
        """Let a block with decoded weights round what its linears read, as the quantized block does."""
        self._rounds = round_inputs(block.sites, roundings_of(block.sites, packed, self.device))

    def _repeat(self, block: Block, index: int, result: BlockResult, streams: list[Streams]) -> None:
        """Carry the streams through a block that is finished already, as if it had been worked on now."""
        for stream in streams:
            stream.advance_original(block, index)
        for path, packed in result.packed.items():
            block.sites[path].put(decode(packed.to(self.device)))
        self._round_inputs(block, result.packed)
        for path, value in result.parameters.items():
            parameter = block.module.get_parameter(path.removeprefix(f"{block.path}."))
            parameter.data = value.to(parameter.device, parameter.dtype)
        self.loans.put(block, settled=True)
        for stream in streams:
            stream.advance(block, index)

    def _quantize(self, index: int, block: Block, streams: Streams | None, held_out: Streams | None) -> BlockResult:
        start = time.perf_counter()
        before = _other_parameters(block)
        moments, uncalled = self._moments(index, block, streams)
        if held_out is not None:
            held_out.advance_original(block, index)
        self.loans.put(block, settled=True)
        work = self._work(index, block, moments, streams, held_out)
        self._strategy(block, streams).quantize(work)
        self._round_inputs(block, work.packed)
        after = _other_parameters(block)
        return BlockResult(
            index,
            block.path,
            _on_cpu(work.packed, self.device),
            work.errors,
            [group for group in work.groups if len(group) > 1 and block.sites[group[0]].pool is None],
            {pool.removesuffix(".down"): of.tokens for pool, of in work.pools.items() if pool.endswith(".down")},
            uncalled,
            {path: value.cpu() for path, value in after.items() if not torch.equal(value, before[path])},
            work.history,
            time.perf_counter() - start,
            torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0,
        )

    def _strategy(self, block: Block, streams: Streams | None) -> Strategy:
        how = self.config.recipe.head
        if not block.head:
            return strategy_for(self.config)
        if not how.steps:
            return Rounding()
        assert streams is not None, "the options refuse to train an output embedding without text"
        return HeadStrategy(HeadText(*streams.whole(), self._after_head), how, self.notice)

    @contextmanager
    def _after_head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield what the model does to the logits of its output embedding, [n, vocabulary]."""
        with outside_on(self.device, self.dtype, self.model, self.blocks):
            yield partial(after_head, self.model, [block for block in self.blocks if not block.head])

    def _moments(self, index: int, block: Block, streams: Streams | None) -> tuple[list[Moments], list[str]]:
        """Return the moments of every distinct input, summed over all ranks, and the linears that were never called."""
        if streams is None:
            eye = {c: torch.eye(c, device=self.device) for c in {s.size.in_features for s in block.sites.values()}}
            return [Moments([path], eye[site.size.in_features]) for path, site in block.sites.items()], []
        total = streams.observe(block, index, self.config.all_experts, self._sample)
        _add_over_ranks(total, self.ranks)
        moments, uncalled = total.checked(block.sites)
        if uncalled:
            self.notice(
                f"{', '.join(uncalled)}: left as they are, since the forward pass of their block never calls them"
            )
        return moments, uncalled

    def _work(
        self, index: int, block: Block, moments: list[Moments], streams: Streams | None, held_out: Streams | None
    ) -> BlockWork:
        named = {path: site.transform_name for path, site in block.sites.items() if site.transform_name is not None}
        groups = _groups(moments, self.plan.layouts, self.config.share_rotations, named)
        data = None
        if streams is not None and self.config.recipe.trains and not block.head:
            data = partial(_block_data, streams, held_out, self.config, self.ranks)
        config = self.config
        if block.head and config.recipe.drift:  # nothing follows it that its correction could feed on
            config = replace(config, recipe=replace(config.recipe, drift=HEAD_DRIFT))
        return BlockWork(
            block=block,
            call=streams.call(index) if streams is not None else None,
            layouts=self.plan.layouts,
            moments=moments,
            pools=pooled(moments, _pools(block)) if streams is not None else {},
            groups=groups,
            seeds={group[0]: seed_of(self.config.seed, group[0]) for group in groups},
            config=config,
            ranks=self.ranks,
            device=self.device,
            data=data,
            kept_as=self.home.dtype(block),
            validation_call=held_out.call(index) if held_out is not None else None,
            rounded=partial(self._rounded, index, block, streams),
            again=partial(self._again, index, block, streams),
        )

    def _again(
        self, index: int, block: Block, streams: Streams | None, roundings: Mapping[str, InputRounding]
    ) -> tuple[list[Moments], dict[str, Pool]]:
        """Return the moments of what the block's linears read now, and those of its pools.

        Some of the linears are quantized; roundings: by path, what these round already.
        """
        assert streams is not None, "a recipe that fits linears in turn has text"
        total = streams.observe(block, index, self.config.all_experts, self._sample, compare=False, roundings=roundings)
        _add_over_ranks(total, self.ranks)
        moments, _ = total.checked(block.sites)
        return moments, pooled(moments, _pools(block))

    @property
    def _sample(self) -> int:
        """How many tokens of each input to keep: those on which the rounding of activations is fitted."""
        return SAMPLED_TOKENS if self.config.activations is not None and self.config.recipe.fits_transform else 0

    def _rounded(
        self,
        index: int,
        block: Block,
        streams: Streams | None,
        roundings: Mapping[str, InputRounding],
        wanted: Collection[str],
    ) -> dict[str, RoundedMoments]:
        """Return the moments of the rounded inputs of the wanted linears, summed over all ranks."""
        assert streams is not None, "linears are fitted to rounded inputs on text alone"
        found = streams.observe_rounded(block, index, roundings, wanted)
        for path in sorted(wanted) if self.ranks.size > 1 else ():
            if path not in found:  # an expert that got no token of this rank's text
                channels = block.sites[path].size.in_features
                found[path] = RoundedMoments(*torch.zeros(2, channels, channels, device=self.device))
            self.ranks.add(found[path].hessian)
            self.ranks.add(found[path].cross)
        return found


def quantize_blocks(
    model: nn.Module, tokens: Tensor | None, config: QuantConfig, device: torch.device
) -> Iterator[BlockResult]:
    """Quantize a model in memory, in place: its modules then compute as the quantized layers do.

    tokens: int64 [samples, T]; recipes that look at no text need none.
    """
    fold_shared(model)
    settle_scales(model)
    plan, blocks = plan_model(model, config)
    yield from Walk(model, blocks, plan, config, device, tokens).run()


def compute_dtype(blocks: list[Block], config: QuantConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of the forward passes: bfloat16 if the model is stored so and the device multiplies it fast, else float32."""
    if config.compute != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.compute]
    stored = {site.dtype for block in blocks for site in block.sites.values()}
    return torch.bfloat16 if device.type == "cuda" and stored == {torch.bfloat16} else torch.float32


def _groups(moments: list[Moments], layouts: Layouts, shared: bool, pools: Mapping[str, str]) -> Groups:
    """Return the linears of each transform; only those of one spec can share it. pools: path → the transform's name, of experts."""
    of_pools: dict[str, list[str]] = {}
    for m in moments:
        for path in m.readers:
            if path in pools:
                of_pools.setdefault(pools[path], []).append(path)
    groups: Groups = [tuple(paths) for paths in of_pools.values()]
    for m in moments:
        if m.readers[0] in pools:
            continue
        if not shared:
            groups += [(path,) for path in m.readers]
            continue
        alike: dict[Any, list[str]] = {}
        for path in m.readers:
            alike.setdefault(layouts[path].spec, []).append(path)
        groups += [tuple(paths) for paths in alike.values()]
    return groups


def _pools(block: Block) -> dict[str, str]:
    """Return path → pool of the block's experts."""
    return {path: site.pool for path, site in block.sites.items() if site.pool is not None}


def _add_over_ranks(total: MomentSum, ranks: Ranks) -> None:
    if ranks.size == 1 or not total.moments:
        return
    tokens = torch.tensor([m.tokens for m in total.moments], device=total.moments[0].hessian.device)
    ranks.add(tokens)
    for moments, count in zip(total.moments, tokens.tolist(), strict=True):
        moments.tokens = count
        ranks.add(moments.hessian)
        if moments.cross is not None:
            ranks.add(moments.cross)


def _block_data(streams: Streams, held_out: Streams | None, config: QuantConfig, ranks: Ranks) -> BlockData:
    """Pair the block's inputs with the outputs to learn: after `observe` the original stream holds outputs, the quantized one still inputs."""
    how = config.recipe.training or config.recipe.refit
    assert streams.original is not None, "block-wise training compares with the original stream"
    assert how is not None, "asked for by the recipe"
    lists = [streams.quantized, streams.original]
    lists += [held_out.quantized, held_out.original or []] if held_out else [[], []]
    limit = min(max(1, how.batch // ranks.size), streams.calls[0].batch)
    return BlockData(*(_even(stream, limit) for stream in lists))


def _even(stream: list[Tensor], limit: int) -> list[Tensor]:
    """Return the stream in micro-batches of one size, of at most `limit` windows."""
    sizes = {len(hidden) for hidden in stream}
    if not sizes or (len(sizes) == 1 and max(sizes) <= limit):
        return stream
    windows = sum(len(hidden) for hidden in stream)
    size = max(n for n in range(1, min(limit, max(sizes)) + 1) if windows % n == 0)
    return list(torch.cat(stream).split(size))


def _require_separate(model: nn.Module, blocks: list[Block], streams: Streams) -> None:
    """Refuse to train a whole model whose blocks give each other more than the hidden states."""
    shares = any(lenders_of(block.module) for block in blocks)
    if shares or any(call.carries for call in streams.calls):
        what = "share layers" if shares else "hand each other more than their states, such as keys and values"
        raise ConfigError(
            f"blocks of {type(model).__name__} {what}, which the training of the whole model does not follow. Leave "
            "--end-to-end out."
        )


def _other_parameters(block: Block) -> dict[str, Tensor]:
    """Return every parameter that is not a quantized linear's, by full path."""
    taken = {id(site.module) for site in block.sites.values()}
    return {
        f"{block.path}.{path}.{name}" if path else f"{block.path}.{name}": parameter.detach().clone()
        for path, module in block.module.named_modules()
        if id(module) not in taken
        for name, parameter in module.named_parameters(recurse=False)
    }


def _on_cpu(packed: dict[str, PackedLinear], device: torch.device) -> dict[str, PackedLinear]:
    """Return the linears' tensors in host memory, from a GPU all copied at once into pinned pages."""
    there = {path: linear.to("cpu", non_blocking=True) for path, linear in packed.items()}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return there


def seed_of(seed: int, path: str) -> int:
    """Return a seed of its own for every transform, the same whatever was quantized before."""
    return (seed * 1_000_003 + zlib.crc32(path.encode())) % 2**63
