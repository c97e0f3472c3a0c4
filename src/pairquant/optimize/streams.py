"""The calibration text on its way through the model: hidden states entering the current block.

Two streams where the recipe compares: that of the model quantized so far, and that of the original.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..models.blocks import Block, enter, outside_on, read_by_head
from ..models.calls import Call, Carry, HeadCall
from ..models.inputs import recorded_inputs
from ..models.rounded_inputs import InputRounding, rounded_inputs
from ..models.sites import embedding_site
from .moments import MomentSum
from .noise import RoundedMoments, RoundedSum

#: Tokens per forward pass through one block, until memory asks for fewer.
MICRO_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Places:
    """device: where blocks run; store: where hidden states are kept between blocks; dtype: of the forward passes."""

    device: torch.device
    store: torch.device
    dtype: torch.dtype


@dataclass
class Streams:
    """quantized, original: float [B, T, H] per micro-batch, kept on `store`; original is None if not needed.

    device: where blocks run; calls: what each block is called with, and the output embedding after them; notice: called with
    text for the user, for example when too little memory makes the micro-batches smaller; carries: what blocks hand each other
    beside the states, "quantized" and "original".
    """

    calls: list[Call]
    quantized: list[Tensor]
    original: list[Tensor] | None
    device: torch.device
    store: torch.device
    notice: Callable[[str], None]
    carries: dict[str, Carry]
    halvings: int = 0

    @classmethod
    def start(
        cls,
        model: nn.Module,
        blocks: list[Block],
        tokens: Tensor,
        keep_original: bool,
        places: Places,
        notice: Callable[[str], None],
        embedding: Tensor | None = None,
    ) -> Streams:
        """Run what precedes the blocks, where its weights are, on tokens int64 [samples, T].

        embedding: what the quantized model has as the weight of its input embedding, where that is not the original's.
        """
        home = next(p.device for p in model.parameters() if not p.is_meta)
        micro_batch = min(max(1, MICRO_BATCH_TOKENS // tokens.shape[1]), len(tokens))
        entry = enter(model, blocks, tokens.to(home), micro_batch)
        if entry.passes > 1:
            notice(
                f"a forward pass runs {entry.passes} times through the blocks; they are calibrated on what they read in the "
                "first pass alone"
            )
        hidden = [h.to(places.store, places.dtype) for h in entry.hidden]
        calls = [call.to(places.device, places.dtype, places.store) for call in entry.calls]
        calls.append(HeadCall((), {}, calls[0].batch))
        original = list(hidden) if keep_original else None
        if embedding is not None:
            with _embedding_of(model, embedding):
                entry = enter(model, blocks, tokens.to(home), micro_batch)
            hidden = [h.to(places.store, places.dtype) for h in entry.hidden]
        carries = {name: Carry(places.store) for name in ("quantized", "original")}
        return cls(calls, hidden, original, places.device, places.store, notice, carries)

    def call(self, index: int, stream: str = "quantized", writes: bool = False) -> Call:
        """Return what a block is called with in one of the streams; writes: whether what it leaves for later blocks is kept."""
        return self.calls[index].on(self.carries[stream], writes)

    @property
    def tokens(self) -> int:
        """The number of tokens of the text."""
        return sum(len(hidden) * hidden.shape[1] for hidden in self.quantized)

    def observe(
        self,
        block: Block,
        index: int,
        all_experts: bool = False,
        sample: int = 0,
        compare: bool = True,
        roundings: Mapping[str, InputRounding] = MappingProxyType({}),
    ) -> MomentSum:
        """Run the block, which still holds its own weights, on the stream(s), and sum the moments of its linears' inputs.

        The original stream moves on to the next block with what that gives; the quantized one stays. all_experts: sum the
        moments of experts as if each got every token; sample: keep about so many tokens of each input; compare: False leaves
        the original stream out and where it is; roundings: by path, what the block rounds already.
        """
        total = MomentSum(max(1, self.tokens // sample) if sample else 0)
        for i, hidden in enumerate(self.quantized):

            def once(windows: Tensor, hidden: Tensor, original: Tensor | None = None) -> Tensor | None:
                reference = output = None
                if original is not None:
                    with recorded_inputs(block.sites, routed=False) as reference:
                        output = self.call(index, "original", writes=True).run(block.module, original, windows)
                with recorded_inputs(block.sites, all_experts=all_experts, roundings=roundings) as inputs:
                    self.call(index).run(block.module, hidden, windows)
                total.add(inputs, reference)
                return output

            if self.original is None or not compare:
                self._within_memory(once, i, hidden)
            else:
                self.original[i] = self._within_memory(once, i, hidden, self.original[i])
        return total

    def observe_rounded(
        self, block: Block, index: int, roundings: Mapping[str, InputRounding], wanted: Collection[str]
    ) -> dict[str, RoundedMoments]:
        """Run the block on the quantized stream, its inputs rounded, and return the moments of the wanted linears by path.

        The stream stays. roundings: by path, of all linears that round; wanted: the paths of some of these. Experts are
        given the tokens that the router chooses for them.
        """
        total = RoundedSum()

        def once(windows: Tensor, hidden: Tensor) -> None:
            part = RoundedSum()  # running out of memory leaves the sums as they were

            def add(path: str, x: Tensor, rounded: Tensor) -> None:
                if path in wanted:
                    part.add(path, x, rounded)

            with rounded_inputs(block.sites, roundings, add):
                self.call(index).run(block.module, hidden, windows)
            for path, found in part.total.items():
                total.include(path, found)

        for i, hidden in enumerate(self.quantized):
            self._within_memory(once, i, hidden)
        return total.total

    def advance(self, block: Block, index: int) -> None:
        """Carry the quantized stream through the block, which now holds its decoded weights."""
        self._advance(self.quantized, block, index, "quantized")

    def advance_original(self, block: Block, index: int) -> None:
        """Carry the original stream through the block, which still holds its own weights."""
        if self.original is not None:
            self._advance(self.original, block, index, "original")

    def enter_head(self, model: nn.Module, blocks: list[Block]) -> None:
        """Carry both streams from the last block to what the output embedding reads. blocks: without the output embedding."""
        with outside_on(self.device, self.quantized[0].dtype, model, blocks):
            for stream in filter(None, (self.quantized, self.original)):
                for i, hidden in enumerate(stream):
                    stream[i] = self._within_memory(lambda _, h: read_by_head(model, blocks, h), i, hidden)

    def whole(self) -> tuple[Tensor, Tensor]:
        """Return both streams in one piece each, [windows, T, H]: the quantized one twice where no original is kept."""
        self.quantized = [torch.cat(self.quantized)]
        if self.original is None:
            return self.quantized[0], self.quantized[0]
        self.original = [torch.cat(self.original)]
        return self.quantized[0], self.original[0]

    def _advance(self, stream: list[Tensor], block: Block, index: int, name: str) -> None:
        call = self.call(index, name, writes=True)
        for i, hidden in enumerate(stream):
            stream[i] = self._within_memory(lambda w, h: call.run(block.module, h, w), i, hidden)

    def _within_memory(self, work: Callable[..., Tensor | None], number: int, *batches: Tensor):
        """Call `work` on micro-batches as large as memory has allowed so far; when it runs out, halve them from then on.

        work: called with the numbers of the windows, int64 [B], and their states, [B, T, H] each; number: which of the stream's
        micro-batches the `batches` are.
        """
        first = number * self.calls[0].batch
        outputs: list[Any] = []
        start = 0
        while start < len(batches[0]):
            size = max(1, self.calls[0].batch >> self.halvings)
            parts = [batch[start : start + size].to(self.device) for batch in batches]
            output, fits = None, True
            try:
                output = work(torch.arange(len(parts[0])) + first + start, *parts)
            except torch.OutOfMemoryError:
                fits = False
                if len(parts[0]) == 1:
                    raise
            if fits:
                outputs.append(output if output is None else output.to(self.store))
                start += size
                continue
            # Outside the handler: the failed pass no longer holds its tensors.
            self.halvings += 1
            self.notice(f"out of memory: going on with micro-batches of {max(1, size // 2)} windows instead of {size}")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return torch.cat(outputs) if outputs[0] is not None and len(outputs) > 1 else outputs[0]

    def tensors(self) -> dict[str, Tensor]:
        """Return both streams, to be stored."""
        streams = {"quantized": self.quantized, "original": self.original or []}
        return {f"{name}.{i}": tensor for name, stream in streams.items() for i, tensor in enumerate(stream)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `tensors` returned."""
        for name, stream in (("quantized", self.quantized), ("original", self.original or [])):
            for i in range(len(stream)):
                stream[i] = tensors[f"{name}.{i}"].to(self.store)


@contextmanager
def _embedding_of(model: nn.Module, weight: Tensor) -> Iterator[None]:
    """Let the model look up other rows for as long as the context is open."""
    site = embedding_site(model)
    assert site is not None, "planning has found the embedding that was quantized"
    parameter = site.module.get_parameter("weight")
    before = parameter.data
    parameter.data = weight.to(parameter.device, parameter.dtype)
    try:
        yield
    finally:
        parameter.data = before
