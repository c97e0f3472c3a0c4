"""The main job on one page: source → checks → calibration → walk → checkpoint.

Everything that can be refused is refused before any work; every finished block is kept in a journal, so that a run that
was stopped, however, goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checkpoint.files import write_error, write_json
from ..checkpoint.journal import Journal
from ..checkpoint.source import SourceWeights
from ..checkpoint.write import require_apart, require_free, require_space
from ..core.linear import decode
from ..core.rounding import poor_errors
from ..models.planning import plan_model
from ..optimize.embedding import quantize_embedding
from ..optimize.end_to_end import EndToEndTraining
from ..optimize.finished import BlockResult
from ..optimize.memory import Demand, demand
from ..optimize.ranks import Ranks, joined
from ..optimize.streams import Streams
from ..optimize.walk import Walk
from ..spec.linear import PackedLinear
from ..spec.mixed import MixedPlan
from ..spec.options import QuantConfig
from ..support.devices import current, resolve_device
from ..support.errors import PairQuantError, SourceError
from ..support.version import __version__, code_digest
from . import remarks
from .finished import Finished
from .folded import folded
from .opened import Opened
from .outcome import PLAN_FILE, Outcome
from .plan import Planner, PlanProgress
from .plan import Silent as SilentPlan
from .refusals import needed_bytes, out_of_memory_explained, require_separate_embeddings, require_storable, shares_head
from .texts import Texts


class Progress(PlanProgress, Protocol):
    """What `quantize` tells while it works. The default says nothing."""

    def plan(self, blocks: int, linears: int, finished: int, memory: Demand) -> None: ...
    def block(self, result: BlockResult) -> None: ...
    def trained(self, epoch: int, epochs: int, divergence: float) -> None: ...
    def advance(self, what: str, done: int, total: int) -> None: ...


class Silent(SilentPlan):
    """A progress that says nothing."""

    def plan(self, blocks: int, linears: int, finished: int, memory: Demand) -> None: ...
    def block(self, result: BlockResult) -> None: ...
    def trained(self, epoch: int, epochs: int, divergence: float) -> None: ...
    def advance(self, what: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class QuantizationSummary:
    """What came out. sizes in bytes; errors: relative output error by linear path."""

    output: Path
    config: QuantConfig
    bits_per_weight: float
    size_before: int
    size_after: int
    seconds: float
    errors: dict[str, float]

    @property
    def poor(self) -> dict[str, float]:
        """The linears that were represented badly, worst first: errors above `POOR_ERROR`."""
        return poor_errors(self.errors)


def quantize(
    model: str | Path,
    output: str | Path,
    config: QuantConfig | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    log_to: Callable[[Mapping[str, Any]], None] | None = None,
) -> QuantizationSummary:
    """Quantize a model and write the checkpoint to `output`.

    model: a Transformers directory, a hub name, or a `.gguf` file; device: "auto", "cpu", "cuda", "cuda:1", …;
    with transform "folded" the model is first folded (`jobs.fold`) into a directory beside the output, kept until all is done;
    fresh: start over instead of continuing a stopped run; log_to: called with every event of the log.
    Raises a `PairQuantError` that says what to mend; whatever happens, an incomplete output is never left behind.
    Started by torchrun, the processes share the work, and each returns the summary.
    """
    config, output = config or QuantConfig(), Path(output)
    require_free(output, overwrite)
    if config.transform == "folded":
        with folded(model, output, config, device, fresh, trust_remote_code, progress or Silent()) as (source, size):
            plain = replace(config, transform="none")
            summary = quantize(
                source, output, plain, device=device, overwrite=overwrite, fresh=fresh, trust_remote_code=trust_remote_code,
                progress=progress, log_to=log_to,
            )  # fmt: skip
        return replace(summary, size_before=size)
    target = resolve_device(device)
    opened = Opened.of(model, config, trust_remote_code)
    require_apart(output, opened.files)
    require_space(output, needed_bytes(opened))
    with current(target), joined(target) as ranks, out_of_memory_explained(config):
        if not ranks.leads:
            progress = None
        return Job(opened, output, target, ranks, progress or Silent(), log_to).run(overwrite, fresh)


@dataclass
class Job:
    """One call of `quantize`, once its arguments are known to be good."""

    opened: Opened
    output: Path
    device: torch.device
    ranks: Ranks
    progress: Progress
    log_to: Callable[[Mapping[str, Any]], None] | None
    mixed: MixedPlan | None = None
    embedding: tuple[PackedLinear, float] | None = None
    started: float = field(default_factory=time.perf_counter)

    def run(self, overwrite: bool, fresh: bool) -> QuantizationSummary:
        self.texts = Texts.drawn(self.opened, self.ranks, self.device, self.progress)
        directory = Journal.beside(self.output)
        with self._journal_kept(directory, fresh) as spill:
            self.progress.stage("source weights")
            self.source = self._source(spill)
            require_separate_embeddings(self.opened, self.source)
            planner = Planner(self.opened, self.source)
            if self.opened.config.target is not None:
                planner.require_reachable(self.opened.config.target)
            self._require_storable()
            self._rehearse(directory)
            self._open_journal()
            try:
                self._choose_forms(planner)
                self._quantize_embedding()
                self._walk()
                self._train_whole()
            finally:
                self.source.close()
            self.progress.stage("writing")
            outcome = self._outcome()
            report = outcome.report()
            if poor := poor_errors(outcome.errors):
                self._notice(remarks.poor_layers(poor))
            if few := remarks.experts_with_few_tokens(self.opened, self.journal.entries):
                self._notice(few)
            self._log({"event": "end", "seconds": report["seconds"], "bits_per_weight": report["bits_per_weight"]})
            if self.ranks.leads:
                outcome.write(self.output, report, overwrite)
            self.ranks.wait()
        size_after = sum(file.stat().st_size for file in self.output.glob("*.safetensors"))
        return QuantizationSummary(
            self.output, self.opened.config, report["bits_per_weight"], self.opened.files.size_bytes(), size_after,
            time.perf_counter() - self.started, outcome.errors,
        )  # fmt: skip

    def _source(self, spill: Path) -> SourceWeights:
        """Return the weights on disk; a copy of them is made by one rank for all."""
        if self.ranks.leads:
            source = SourceWeights.open(self.opened.files, self.opened.skeleton, self.opened.names, spill)
            self.ranks.wait()
            return source
        self.ranks.wait()
        return SourceWeights.open(self.opened.files, self.opened.skeleton, self.opened.names, spill, spilled=True)

    def _open_journal(self) -> None:
        identity = {
            "source": self.source.digest(),
            "config": self.opened.config.to_dict(),
            **self.texts.digests(),
            "device": self.device.type,
            "ranks": self.ranks.size,
            "versions": {"pairquant": f"{__version__}+{code_digest()}", "torch": torch.__version__},
        }
        if self.ranks.leads:
            self.journal.begin(identity)
        self.ranks.wait()
        if not self.ranks.leads:
            self.journal.read()

    def _choose_forms(self, planner: Planner) -> None:
        """Replace the plan by one of the size wanted, if one is; a run that goes on keeps the plan that it began with."""
        target, file = self.opened.config.target, self.journal.directory / PLAN_FILE
        calibration = self.texts.calibration
        if target is None or calibration is None:
            self.mixed = self.opened.config.plan
            return
        if self.ranks.leads and not file.exists():
            result = planner.choose(planner.measure(calibration.tokens, self.device, self.progress), target)
            self.progress.planned(result)
            write_json(file, result.plan.to_dict())
        self.ranks.wait()
        self.mixed = MixedPlan.read(file)
        config = replace(self.opened.config, target=None, plan=self.mixed)
        plan, blocks = plan_model(self.opened.skeleton, config, self.opened.names)
        self.opened = replace(self.opened, plan=plan, blocks=blocks)
        self.journal.layouts = self.opened.plan.layouts
        self._require_storable()

    def _quantize_embedding(self) -> None:
        """Quantize the input embedding, if it is to be: without text and soon done, so that no journal keeps it."""
        site = self.opened.embedding
        if site is None:
            return
        self.progress.stage("input embedding")
        weight = site.taken(self.source.load(site.parameter))
        layout = self.opened.plan.layouts[site.path]
        self.embedding = quantize_embedding(site.path, weight, layout, self.opened.config, self.device)
        self._notice(remarks.of_embedding(layout, self.embedding[1]))

    def _walk(self) -> None:
        calibration = self.texts.calibration
        share = self._share(calibration.tokens if calibration else None)
        held_out = self._share(self.texts.validation)
        read = sum(len(t) for t in (self._share(self.texts.whole), self._share(self.texts.held_out)) if t is not None)
        memory = demand(
            self.opened.skeleton, self.opened.blocks, self.opened.config, share, held_out, self.device,
            read * self.opened.config.seq_len,
        )  # fmt: skip
        self.progress.plan(len(self.opened.blocks), len(self.opened.plan.layouts), self.journal.count, memory)
        told = remarks.of_head(self.opened, shares_head(self.opened, self.source))
        how = self.opened.config.recipe.end_to_end
        if how is not None and self.texts.whole is not None:
            told.append(remarks.of_last_training(how.epochs, self.texts.whole.numel(), memory))
        told = [
            *remarks.of_weights(self.opened, self.device),
            *remarks.of_activations(self.opened, self.device, calibration.tokens.numel() if calibration else 0),
            *remarks.of_fitting_in_turn(self.opened.config),
            *remarks.of_own_transforms(self.opened),
            *remarks.left_plain(self.opened),
            *told,
        ]
        for line in [*remarks.exceptions(self.opened.plan), *told]:
            self._notice(line)
        self._log(
            {"event": "start", "blocks": len(self.opened.blocks), "finished": self.journal.count, **memory.to_dict()}
        )
        if self.journal.count == len(self.opened.blocks):
            return
        self.source.fill_all_but(self.opened.skeleton, self.opened.blocks)
        walk = Walk(
            self.opened.skeleton, self.opened.blocks, self.opened.plan, self.opened.config, self.device, share, held_out,
            home=self.source, finished=Finished(self.journal), ranks=self.ranks, store=memory.store,
            notice=self._notice, kept=self._keep_streams, embedding=self._decoded_embedding(),
        )  # fmt: skip
        for result in walk.run():
            self._keep(result)
            self.progress.block(result)
        self.journal.settle()

    def _keep(self, result: BlockResult) -> None:
        entry = {k: v for k, v in vars(result).items() if k not in ("packed", "parameters")}
        tensors = self._tensors(result.index, result.packed, result.parameters)
        if self.ranks.leads:
            self.journal.append(tensors, entry)
        else:
            self.journal.entries.append(entry)
        self._log({"event": "block", **entry})
        self._last_seconds = result.seconds

    def _tensors(
        self, index: int, linears: Mapping[str, PackedLinear], parameters: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return what the checkpoint holds of a block, by full name. linears, parameters: by path."""
        sites = self.opened.blocks[index].sites
        tensors = {
            sites[path].stored_name(name): tensor
            for path, packed in linears.items()
            for name, tensor in packed.tensors.items()
        }
        for name, value in parameters.items():
            field = self.source.field(name)
            tensors[self.opened.names.stored(name)] = value if field is None else value.to(field.dtype)
        return tensors

    def _train_whole(self) -> None:
        """Train all blocks at once, if the recipe does; a run that goes on may have done so already."""
        how, opened, tokens = self.opened.config.recipe.end_to_end, self.opened, self._share(self.texts.whole)
        if how is None or tokens is None or self.journal.revised is not None:
            return
        self.ranks.wait()  # the leading process has written what the others read now
        self.source.fill_all_but(opened.skeleton, opened.blocks, head=True)
        epochs: list[float] = []
        started = time.perf_counter()

        def tell(epoch: int, divergence: float) -> None:
            epochs.append(divergence)
            self.progress.trained(epoch, how.epochs, divergence)
            self._log({"event": "end_to_end", "epoch": epoch, "kl": divergence})

        finished = Finished(self.journal)
        training = EndToEndTraining(
            opened.skeleton, opened.blocks, [finished.result(i) for i in range(self.journal.count)], opened.config,
            self.device, self.source, self.ranks, self._notice, tell, self._decoded_embedding(),
        )  # fmt: skip
        trained = training.run(tokens, self._share(self.texts.held_out))
        if self.ranks.leads:
            blocks = (self._tensors(i, block.packed, block.parameters) for i, block in enumerate(trained))
            self.journal.revise(blocks, {"kl": epochs, "seconds": time.perf_counter() - started})

    def _share(self, tokens: Tensor | None) -> Tensor | None:
        """Return this process's windows."""
        return None if tokens is None else self.ranks.windows(tokens)

    def _require_storable(self) -> None:
        if self.ranks.leads:
            require_storable(self.opened, self.source, self.device)

    def _keep_streams(self, index: int, streams: Streams) -> None:
        if self.ranks.size == 1:
            self.journal.keep_streams(index + 1, streams.tensors(), self._last_seconds)

    def _notice(self, text: str) -> None:
        self.progress.notice(text)
        self._log({"event": "notice", "text": text})

    def _log(self, event: Mapping[str, Any]) -> None:
        if self.ranks.leads:
            self.journal.log(event)
            if self.log_to is not None:
                self.log_to(event)

    def _rehearse(self, journal: Path) -> None:
        """Write the description once, and throw it away: what fails is to fail before the work, not after."""
        if not self.ranks.leads:
            return
        try:
            with TemporaryDirectory(dir=journal) as directory:
                self._outcome().describe(Path(directory))
        except (OSError, ValueError, TypeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise write_error(journal, error, "Choose another --output, or free some space.") from error
            if isinstance(error, PairQuantError):
                raise
            raise SourceError(
                f"the configuration or tokenizer of {self.opened.files.name!r} cannot be saved: {error}. Mend it there first."
            ) from error

    def _outcome(self) -> Outcome:
        return Outcome(self.opened, self.source, self.journal, self.texts, self.mixed, self.embedding)

    def _decoded_embedding(self) -> Tensor | None:
        return None if self.embedding is None else decode(self.embedding[0])

    @contextmanager
    def _journal_kept(self, directory: Path, fresh: bool) -> Iterator[Path]:
        """Keep the journal after an error if a block is finished, and remove it otherwise and after success."""
        existed = directory.exists()
        self.journal = Journal(directory, self.opened.plan.layouts)
        if self.ranks.leads:
            self.journal.lock()
            if fresh:
                self.journal.clear()
        self.ranks.wait()
        try:
            yield directory / "source"
        except BaseException:
            self.journal.close()
            if self.ranks.leads and (fresh or not existed) and not self.journal.count:
                self.journal.remove()
            raise
        if self.ranks.leads:
            self.journal.remove()
