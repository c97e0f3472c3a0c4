"""Train what is continuous in the whole quantized model, so that its output comes closer to the original's.

The codes are fixed; group scales, channel scales, angles and norm weights are trained. The loss is the divergence
KL(original ‖ quantized) of the next token, in nats per token. (EfficientQAT, arXiv 2407.11062,
ends with a training of group scales on the text itself.)

Every step runs the model block by block, forwards and then backwards. The device holds the codes of all blocks, one byte
each, and the dense weights of one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.blocks import Block, outside_on, run_from
from ..spec.linear import PackedLinear
from ..spec.options import QuantConfig
from ..spec.recipe import EndToEnd
from ..support.errors import CalibrationError
from .descent import Descent, leaves_of, pass_on
from .finished import BlockResult
from .homes import Home
from .ranks import ALONE, Ranks
from .stages import Groups, RefitStage
from .streams import Places, Streams
from .substituted import Substituted, Weights
from .walk import compute_dtype

#: Windows whose states are on the device at once where the divergence is measured: each time all weights are decoded.
MEASURED_TOGETHER = 32


@dataclass(frozen=True)
class Trained:
    """What became of one block. packed: its linears, by path; parameters: its norm weights, by path; both on the CPU."""

    packed: dict[str, PackedLinear]
    parameters: dict[str, Tensor]


@dataclass
class EndToEndTraining:
    """What a training works with.

    blocks: of the original model, the output embedding last if it is quantized; home: where their weights come from; the
    rest of the model is on the CPU, a plain output embedding too. results: what quantizing gave each block. report: called
    with each epoch and the mean divergence after it, from 0, the start. ranks: hold equally many windows each. embedding: the
    decoded weight of a quantized input embedding.
    """

    model: nn.Module
    blocks: list[Block]
    results: Sequence[BlockResult]
    config: QuantConfig
    device: torch.device
    home: Home
    ranks: Ranks = ALONE
    notice: Callable[[str], None] = lambda text: None
    report: Callable[[int, float], None] = lambda epoch, divergence: None
    embedding: Tensor | None = None

    def __post_init__(self) -> None:
        self.how = self.config.recipe.end_to_end or EndToEnd()
        self.dtype = compute_dtype(self.blocks, self.config, self.device)
        self.decoders = [block for block in self.blocks if not block.head]

    @torch.no_grad()
    def run(self, tokens: Tensor, held_out: Tensor | None = None) -> list[Trained]:
        """Train on a text, int64 [windows, T], this rank's share. Returns the blocks in their order.

        held_out: windows like those, on which the divergence is measured that chooses the epoch; None: the same ones.
        Raises `CalibrationError` if the divergence at the start is not finite.
        """
        every = tokens if held_out is None else torch.cat([tokens, held_out])
        places = Places(self.device, torch.device("cpu"), self.dtype)
        streams = Streams.start(self.model, self.decoders, every, True, places, self.notice, self.embedding)
        entering = torch.cat(streams.quantized)
        streams.quantized.clear()
        students = self._students(streams)
        judged = torch.arange(0 if held_out is None else len(tokens), len(every))
        leaving = torch.cat(streams.original or [])
        streams.original = None
        with self._end(every, leaving) as end:
            whole = _Whole(students, end, entering, max(1, streams.calls[0].batch >> streams.halvings))
            self._descend(whole, len(tokens), judged)
        heads = [] if end.head is None else [end.head.trained()]
        return [*(student.trained() for student in students), *heads]

    def _students(self, streams: Streams) -> list[_Student]:
        """Carry the original's stream through all decoder blocks, and return each as it is quantized."""
        found = []
        for index, block in enumerate(self.decoders):
            self.home.enter(block, self.device, self.dtype)
            if index + 1 < len(self.blocks):
                self.home.expect(self.blocks[index + 1], self.device)
            try:
                streams.advance_original(block, index)
                with _holding(block, self.results[index].parameters):
                    found.append(_Student(block, self._stage(block, self.results[index]), streams, index))
            finally:
                self.home.leave(block)
        return found

    def _stage(self, block: Block, result: BlockResult) -> RefitStage:
        """Return what is trained in a block that holds the norm weights to begin with."""
        recipe, kept_as = self.config.recipe, self.home.dtype(block)
        return RefitStage(block, groups_of(block, result), result.packed, recipe, self.how, kept_as, self.device)

    @contextmanager
    def _end(self, tokens: Tensor, leaving: Tensor) -> Iterator[_End]:
        """Hold what follows the decoder blocks on the device. leaving: the original's states there, [windows, T, H]."""
        with ExitStack() as stack:
            stack.enter_context(outside_on(self.device, self.dtype, self.model, self.blocks))
            head = self.blocks[-1] if self.blocks[-1].head else None
            stage = None
            if head is not None:
                self.home.enter(head, self.device, self.dtype)
                stack.callback(self.home.leave, head)
                stage = _Head(head, self._stage(head, self.results[-1]))
            yield _End(self.model, self.decoders, tokens, leaving, self.device, self.dtype, stage)

    def _descend(self, whole: _Whole, windows: int, judged: Tensor) -> None:
        """Train on the first windows of the text. judged: those that choose the epoch, int64 [n]."""
        how, ranks = self.how, self.ranks
        per_step = max(1, how.batch // ranks.size)
        steps = how.epochs * -(-windows // per_step)
        descent = Descent(whole.trained, how.training, steps)
        generator = torch.Generator().manual_seed(self.config.seed)
        best = ranks.mean(whole.divergence(judged), self.device)
        if not math.isfinite(best):
            raise CalibrationError(
                "the divergence of the quantized model is not finite on the calibration text. Check the source model, or "
                "compute in a wider dtype: QuantConfig(compute='float32')."
            )
        kept = descent.values()
        self.report(0, best)
        for epoch in range(1, how.epochs + 1):
            for chosen in torch.randperm(windows, generator=generator).split(per_step):
                whole.gather(chosen)
                ranks.average(descent.gradients)
                descent.step()
            measured = ranks.mean(whole.divergence(judged), self.device)
            if measured < best:
                best, kept = measured, descent.values()
            self.report(epoch, measured)
        descent.end(kept)


def groups_of(block: Block, result: BlockResult) -> Groups:
    """Return the linears of each transform of a quantized block: pools of experts, shared ones, and single ones."""
    pools: dict[str, list[str]] = {}
    for path in result.packed:
        pools.setdefault(block.sites[path].transform_name or "", []).append(path)
    alone = pools.pop("", [])
    shared = [tuple(group) for group in result.shared]
    taken = {path for group in shared for path in group}
    return [*map(tuple, pools.values()), *shared, *((path,) for path in alone if path not in taken)]


@contextmanager
def _holding(block: Block, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a block hold other values of some parameters, by full path, for as long as the context is open."""
    own = {path: block.module.get_parameter(path.removeprefix(f"{block.path}.")) for path in parameters}
    before = {path: parameter.data for path, parameter in own.items()}
    for path, value in parameters.items():
        own[path].data = value.to(own[path].device, own[path].dtype)
    try:
        yield
    finally:
        for path, data in before.items():
            own[path].data = data


class _Student:
    """One quantized decoder block."""

    def __init__(self, block: Block, stage: RefitStage, streams: Streams, index: int):
        replaced = {block.sites[path].parameter for group in stage.groups for path in group}
        layouts = {path: packed.layout for path, packed in stage.start.items()}
        self.stage, self.runner = stage, Substituted(block, streams.calls[index], layouts, replaced)

    def forwards(self, hidden: Sequence[Tensor], windows: Sequence[Tensor]) -> Iterator[Tensor]:
        """Run micro-batches [B, T, H] through the block, one after the other. windows: their numbers, int64 [B] each."""
        weights = self.stage.weights()
        return (self.runner.of(weights, states, some) for states, some in zip(hidden, windows, strict=True))

    def backwards(self, hidden: Sequence[Tensor], slopes: Sequence[Tensor], windows: Sequence[Tensor]) -> list[Tensor]:
        """Gather the gradients of what is trained from those of the outputs; return those of the inputs."""
        with torch.enable_grad():
            weights = self.stage.weights()
            leaves, before = leaves_of(weights), []
            for states, slope, some in zip(hidden, slopes, windows, strict=True):
                leaf = states.detach().requires_grad_()
                output = self.runner.of(leaves, leaf.clone(), some)  # some blocks change what they are given
                torch.autograd.backward(output, slope.to(output))
                assert leaf.grad is not None, "a block reads its input"
                before.append(leaf.grad)
            pass_on(weights, leaves)
        return before

    def trained(self) -> Trained:
        """Return the block as it is now."""
        return _finished(self.stage)


def _finished(stage: RefitStage) -> Trained:
    norms = {name: stage.as_kept(norm).cpu() for name, norm in stage.norms.items()}
    return Trained({path: linear.to("cpu") for path, linear in stage.packed().items()}, norms)


class _Head:
    """The quantized output embedding. Its module holds the original weight, which the original's logits need."""

    def __init__(self, block: Block, stage: RefitStage):
        (self.site,) = block.sites.values()
        self.module, self.stage = block.module, stage

    @contextmanager
    def quantized(self, weights: Weights) -> Iterator[None]:
        """Let the module compute with the quantized weight for as long as the context is open."""
        weight = self.site.as_held(weights[self.site.parameter]).to(self.site.dtype)
        self.module.forward = lambda x: F.linear(x, weight, self.site.bias)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.module.forward

    def trained(self) -> Trained:
        """Return the output embedding as it is now."""
        return _finished(self.stage)


@dataclass(frozen=True)
class _End:
    """What follows the decoder blocks, up to the divergence of the logits.

    tokens: int64 [windows, T]; leaving: the original's states after the last block, [windows, T, H]; device, dtype: what the
    logits are computed on and in; head: the quantized output embedding, None for a plain one.
    """

    model: nn.Module
    decoders: list[Block]
    tokens: Tensor
    leaving: Tensor
    device: torch.device
    dtype: torch.dtype
    head: _Head | None

    def divergence(self, window: int, states: Tensor, weights: Weights) -> Tensor:
        """Return the mean KL over the tokens of a window. states: of the quantized model, [T, H]; weights: of the head."""
        tokens = self.tokens[window][None].to(self.device)
        with torch.no_grad():
            original = self._log_p(tokens, self.leaving[window][None].to(self.device, self.dtype))
        with self.head.quantized(weights) if self.head is not None else ExitStack():
            quantized = self._log_p(tokens, states[None].to(self.dtype))
        return F.kl_div(quantized, original, reduction="sum", log_target=True) / len(quantized)

    def _log_p(self, tokens: Tensor, states: Tensor) -> Tensor:
        return run_from(self.model, self.decoders, tokens, states)[0].float().log_softmax(-1)

    def weights(self) -> Weights:
        """Return those of a quantized output embedding, differentiable."""
        return self.head.stage.weights() if self.head is not None else {}


class _Whole:
    """The quantized model. entering: what enters its first block, [windows, T, H]; size: windows of a micro-batch."""

    def __init__(self, students: list[_Student], end: _End, entering: Tensor, size: int):
        self.students, self.end, self.entering, self.size = students, end, entering, size

    @property
    def trained(self) -> list[tuple[Tensor, float]]:
        """All trained tensors, with their rates."""
        stages = [student.stage for student in self.students]
        stages += [self.end.head.stage] if self.end.head is not None else []
        return [pair for stage in stages for pair in stage.trained]

    def divergence(self, chosen: Tensor) -> float:
        """Return the mean over these windows, int64 [n]."""
        found = [kl for some in chosen.split(MEASURED_TOGETHER) for kl in self._divergences(some)]
        return torch.stack(found).double().mean().item()

    def _divergences(self, chosen: Tensor) -> list[Tensor]:
        states = self._entering(chosen)
        parts = chosen.split(self.size)
        for student in self.students:
            for i, output in enumerate(student.forwards(states, parts)):
                states[i] = output
        weights = self.end.weights()
        windows = zip(chosen.tolist(), torch.cat(states), strict=True)
        return [self.end.divergence(window, own, weights) for window, own in windows]

    def _entering(self, chosen: Tensor) -> list[Tensor]:
        """Return what enters the first block, in micro-batches [B, T, H], float32."""
        return [self.entering[part].to(self.end.device, torch.float32) for part in chosen.split(self.size)]

    def gather(self, chosen: Tensor) -> None:
        """Gather the gradients of the mean divergence of these windows, int64 [n]."""
        states, entered, parts = self._entering(chosen), [], chosen.split(self.size)
        for student in self.students:
            entered.append(states)
            states = list(student.forwards(states, parts))
        slopes = self._slopes(chosen, states)
        for student in reversed(self.students):
            slopes = student.backwards(entered.pop(), slopes, parts)

    def _slopes(self, chosen: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the states that leave the last block; gather those of the output embedding."""
        with torch.enable_grad():
            weights = self.end.weights()
            leaves = leaves_of(weights)
            slopes = []
            for windows, batch in zip(chosen.split(self.size), states, strict=True):
                leaf = batch.detach().requires_grad_()
                for window, own in zip(windows.tolist(), leaf, strict=True):
                    (self.end.divergence(window, own, leaves) / len(chosen)).backward()
                assert leaf.grad is not None, "logits depend on the states"
                slopes.append(leaf.grad)
            pass_on(weights, leaves)
        return slopes
