"""`fold` on one page: source → look → calibration text → learn → rewrite → a plain model that computes the same.

The result is a model directory that every tool takes; its weights are easier to round than the source's.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ..checkpoint.record import FOLDED
from ..checkpoint.source import SourceWeights, digest_of
from ..checkpoint.write import Entry, require_apart, require_free, require_space, write_checkpoint
from ..models.blocks import enter, head_block
from ..models.calls import linked
from ..models.foldable import LOOK_TOKENS, Heads, look
from ..models.foldable_outside import look_outside
from ..models.folding import Foldable
from ..models.sharing import lenders_of
from ..optimize.folding import STREAM_STEPS, Learned, Learning
from ..optimize.ranks import Ranks
from ..spec.options import QuantConfig
from ..spec.recipe import Recipe
from ..support.devices import current, resolve_device
from ..support.errors import ConfigError
from ..support.formatting import counted, size
from ..support.version import __version__
from .opened import Opened
from .progress import Told
from .rewritten import Rewritten
from .texts import Texts

#: Where models are looked at: kernels of GPUs round in ways (TF32) that hide what is no rounding. It is a few tokens a block.
LOOKS_ON = torch.device("cpu")
#: How the name of a directory ends that holds a copy of a source which cannot be streamed.
SPILLED = ".source"


class Progress(Told, Protocol):
    """What `fold` tells while it works: how many of the blocks, or of the steps, are done."""

    def advance(self, what: str, done: int, total: int) -> None: ...


class Silent:
    """A progress that says nothing."""

    def stage(self, text: str) -> None: ...
    def notice(self, text: str) -> None: ...
    def advance(self, what: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class FoldSummary:
    """What came out. rotated: whether the stream was rotated; norms, pairs: how many got a transform; errors: mean relative
    proxy error of the stream's readers, rounded to nearest, before and after, or None; untied: bytes of an output embedding
    that was the input embedding, 0 if it was its own already."""

    output: Path
    rotated: bool
    norms: int
    pairs: int
    errors: tuple[float, float] | None
    untied: int
    seconds: float


def fold(
    model: str | Path,
    output: str | Path,
    config: QuantConfig | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    untie: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> FoldSummary:
    """Write a plain model to `output` that computes what `model` does, and whose weights are easier to round.

    model: a Transformers directory, a hub name, or a `.gguf` file; config: bits, group size, rotations, text and the recipe's
    steps are used; device: "auto", "cpu", "cuda", …; untie: rotate the stream of a model whose output embedding is its input
    embedding too, which parts them and makes the files larger. The dtypes are the source's. Raises a `PairQuantError` that says what to
    mend: `ConfigError` for a model in which nothing can be folded; whatever happens, no incomplete output is left behind.
    """
    config, output = fitting(config or QuantConfig()), Path(output)
    require_free(output, overwrite)
    target = resolve_device(device)
    opened = Opened.of(model, config, trust_remote_code)
    require_apart(output, opened.files)
    require_space(output, needed_bytes(opened))
    with current(target):
        return Job(opened, output, target, progress or Silent(), untie).run(overwrite)


def fitting(config: QuantConfig) -> QuantConfig:
    """Return the options by which transforms are fitted: those of blocks in one width, without embeddings and training."""
    recipe = replace(config.recipe, training=None, refit=None, end_to_end=None, head=Recipe.head, drift=0.0)
    plain = {
        "head_bits": None,
        "embedding_bits": None,
        "target": None,
        "plan": None,
        "transform": "rotated",
        "activations": None,
    }
    return replace(config, recipe=recipe, **plain)  # type: ignore[arg-type]


def needed_bytes(opened: Opened) -> int:
    """Return the disk that the folded model takes, and a copy of a source that cannot be streamed."""
    files = opened.files
    embedding = opened.skeleton.get_input_embeddings().weight
    return (2 + 4 * bool(files.gguf)) * files.size_bytes() + 2 * embedding.numel() + files.side_bytes()


@dataclass
class Job:
    """One call of `fold`, once its arguments are known to be good."""

    opened: Opened
    output: Path
    device: torch.device
    progress: Progress
    untie: bool = False
    started: float = field(default_factory=time.perf_counter)

    def run(self, overwrite: bool) -> FoldSummary:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        for left in self.output.parent.glob(f".{self.output.name}.*{SPILLED}"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        spill = Path(tempfile.mkdtemp(prefix=f".{self.output.name}.", suffix=SPILLED, dir=self.output.parent))
        try:
            self.progress.stage("source weights")
            source = self.source = SourceWeights.open(self.opened.files, self.opened.skeleton, self.opened.names, spill)
            try:
                self._require_own_names()
                self._look()
                learned = self._learn()
                self.progress.stage("writing")
                self._write(learned, overwrite)
            finally:
                source.close()
        finally:
            shutil.rmtree(spill, ignore_errors=True)
        errors = None if learned.before is None or learned.after is None else (learned.before, learned.after)
        return FoldSummary(
            self.output, self.rotate, len(learned.transforms.norms), len(learned.transforms.pairs), errors,
            self._untied() if self.rotate else 0, time.perf_counter() - self.started,
        )  # fmt: skip

    def _require_own_names(self) -> None:
        if self.source.originals is not None:
            raise ConfigError(
                f"{self.opened.files.name!r} stores weights that Transformers changes when it loads them, so that folded ones could "
                "not be stored under their names. Quantize it with --transform rotated."
            )

    def _look(self) -> None:
        """Find out what can be folded, on the weights themselves, and say it."""
        self.progress.stage("what can be folded")
        opened, config = self.opened, self.opened.config
        group, width = config.spec.group_size, opened.skeleton.get_input_embeddings().weight.shape[1]
        head = opened.skeleton.get_output_embeddings()
        if head is not None:
            head_block(opened.skeleton)  # from here on it is no longer the input embedding
        self.source.fill_all_but(opened.skeleton, opened.blocks, head=True)
        self.outside = look_outside(opened.skeleton, opened.blocks, width, group, LOOKS_ON)
        if opened.names.unknown and self.outside.reason is None:
            reason = (
                f"{opened.names.unknown[0]}, which {type(opened.skeleton).__name__} does not use, may read the stream"
            )
            self.outside = replace(self.outside, reason=reason)
        tokens = torch.arange(LOOK_TOKENS)[None] % opened.skeleton.get_input_embeddings().weight.shape[0]
        calls = linked(enter(opened.skeleton, opened.blocks, tokens, 1).calls)
        lent = {layer for block in opened.blocks for layer in lenders_of(block.module).values()}
        heads, self.found = Heads.of(opened.skeleton.config), list[Foldable]()
        for index, block in enumerate(opened.blocks):
            self.source.enter(block, LOOKS_ON, torch.float32)
            try:
                call = calls[index].to(LOOKS_ON, torch.float32)
                self.found.append(look(block, call, width, heads, group, lent))
            finally:
                self.source.leave(block)
            self.progress.advance("looking", index + 1, len(opened.blocks))
        reasons = [self.outside.reason, *(found.reason for found in self.found), self._tie()]
        self.reason = next((reason for reason in reasons if reason is not None), None)
        self.rotate = self.reason is None and config.spec.rotations > 0
        self._say()

    def _tie(self) -> str | None:
        """Return why the stream of a model whose embeddings are one is left as it is; None where it need not be."""
        untied = self._untied()
        if not untied or self.untie:
            return None
        return (
            f"the output embedding is the input embedding, and a rotation would part them, which adds {size(untied)} to the files "
            "(pairquant fold --untie does it)"
        )

    def _say(self) -> None:
        """Say what will be folded and what not, before the work; raises `ConfigError` if nothing can be."""
        norms = sum(len(found.norms) for found in self.found)
        pairs = [pair for found in self.found for pair in found.pairs]
        if not self.rotate and not norms and not pairs:
            raise ConfigError(
                f"nothing can be folded into {self.opened.files.name!r}: {self.reason}. Quantize it with --transform rotated."
            )
        if self.rotate:
            self.progress.notice("a rotation of the stream is folded into embedding, blocks and output embedding")
            if untied := self._untied():
                self.progress.notice(
                    f"the output embedding was the input embedding. Folding parts them, which adds {size(untied)} to the files"
                )
        elif self.reason is not None:
            self.progress.notice(f"the stream is not rotated: {self.reason}")
        turned = sum(pair.rotates for pair in pairs)
        self.progress.notice(
            f"scales are folded into {counted(norms, 'norm')} and {counted(len(pairs), 'pair')} of layers, "
            f"rotations of heads into {turned} of these"
        )
        bare = [
            block.path
            for block, found in zip(self.opened.blocks, self.found, strict=True)
            if not found.norms and not found.pairs
        ]
        if bare:
            self.progress.notice(f"nothing is folded into {counted(len(bare), 'block')}, such as {bare[0]}")

    def _untied(self) -> int:
        """Return the bytes of an output embedding that will be stored apart and was not; 0 if there is none."""
        return sum(
            field.nbytes
            for name in self.source.tied
            if (field := self.source.field(name)) is not None and self._head_name(name) not in self.source.stored.fields
        )

    def _head_name(self, parameter: str) -> str:
        """Return the name under which the output embedding is stored."""
        return f"{self.opened.names.module(parameter.removesuffix('.weight'))}.weight"

    def _learn(self) -> Learned:
        self.texts = Texts.drawn(self.opened, Ranks(), self.device, self.progress)
        if self.texts.calibration is None:
            raise ConfigError("preset 'rtn' uses no text, and transforms are fitted on text. Choose another --preset.")
        self.progress.stage("transforms")
        blocks, steps = len(self.opened.blocks), STREAM_STEPS * self.opened.config.recipe.steps
        learning = Learning(
            self.opened.skeleton, self.opened.blocks, self.found, self.rotate, self.opened.config, self.device, self.source,
            self.progress.notice, lambda index: self.progress.advance("blocks", index + 1, blocks),
            lambda step: self.progress.advance("steps", step + 1, steps),
        )  # fmt: skip
        learned = learning.run(self.texts.calibration.tokens)
        if learned.before is not None and learned.after is not None:
            self.progress.notice(
                f"relative error of what reads the stream, rounded to nearest: {learned.before:.3%} before, {learned.after:.3%} after"
            )
        return learned

    def _write(self, learned: Learned, overwrite: bool) -> None:
        opened, source = self.opened, self.source
        rewritten = Rewritten(opened, source, self.found, self.outside, learned.transforms, self.device)
        changed = rewritten.entries()
        kept = {
            name: Entry(stored, lambda name=name: source.load_stored(name))  # type: ignore[misc]
            for name, stored in source.plain_fields([], opened.names).items()
            if name not in changed
        }
        embedding = opened.skeleton.get_input_embeddings().weight.dtype

        def describe(directory: Path) -> None:
            untied = self.rotate and self._untied() > 0
            opened.files.describe(directory, opened.skeleton, opened.tokenizer, embedding, None, untied)

        write_checkpoint(self.output, {**kept, **changed}, describe, self._report(learned), overwrite)

    def _report(self, learned: Learned) -> dict[str, Any]:
        config, calibration = self.opened.config, self.texts.calibration
        assert calibration is not None, "transforms were fitted on it"
        facts = {
            **identity(self.opened, self.device),
            "stream": self.rotate,
            "norms": len(learned.transforms.norms),
            "pairs": len(learned.transforms.pairs),
            **({"reason": self.reason} if self.reason else {}),
            **({} if learned.before is None else {"error_before": learned.before, "error_after": learned.after}),
        }
        provenance = {
            "tool": f"pairquant {__version__}",
            "source": self.opened.files.name,
            "seed": config.seed,
            "calibration": list(calibration.sources),
            "calibration_tokens": list(calibration.tokens.shape),
            "calibration_sha256": calibration.digest,
        }
        return {FOLDED: facts, "provenance": provenance}


def identity(opened: Opened, device: torch.device) -> dict[str, Any]:
    """Return what tells a folded model from one of another source or with other options."""
    return {
        "from": opened.files.name,
        "source": digest_of(opened.files.weight_files()),
        "config": opened.config.to_dict(),
        "device": device.type,
        "version": __version__,
    }
