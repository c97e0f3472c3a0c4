"""What a run writes: every tensor of the checkpoint, what describes them, and the record beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.describe import readme_digest
from ..checkpoint.files import write_json
from ..checkpoint.journal import Journal, copy_log
from ..checkpoint.record import END_TO_END, FOLDED, REPORT_FILE, read_record
from ..checkpoint.source import SourceWeights
from ..checkpoint.write import Entry, write_checkpoint
from ..models.sites import is_linear
from ..spec.checkpoint import CheckpointConfig
from ..spec.experts import bits_per_weight
from ..spec.fields import Field
from ..spec.linear import PackedLinear
from ..spec.mixed import MixedPlan
from ..support.version import __version__
from .opened import Opened
from .texts import Texts

#: The plan's file, in the journal and in the checkpoint.
PLAN_FILE = "pairquant-plan.json"


@dataclass(frozen=True)
class Outcome:
    """What became of a model. source: its weights; journal: what was quantized; texts: what it was quantized on.

    mixed: the plan that gave each layer its form; embedding: the packed input embedding and its relative error.
    """

    opened: Opened
    source: SourceWeights
    journal: Journal
    texts: Texts
    mixed: MixedPlan | None = None
    embedding: tuple[PackedLinear, float] | None = None

    @property
    def errors(self) -> dict[str, float]:
        """The error of each quantized linear, and of the input embedding, by path."""
        found = {path: error for entry in self.journal.entries for path, error in entry["errors"].items()}
        site = self.opened.embedding
        return found if site is None or self.embedding is None else {site.path: self.embedding[1], **found}

    def write(self, output: Path, report: Mapping[str, Any], overwrite: bool) -> None:
        """Write the checkpoint. report: what `report` returned."""

        def describe(directory: Path) -> None:
            self.describe(directory)
            copy_log(self.journal, directory)

        kept = "Finished blocks are kept: run the same command again to continue."
        write_checkpoint(output, self._entries(), describe, dict(report), overwrite, kept)

    def describe(self, directory: Path) -> None:
        """Write all of the checkpoint but its weights."""
        opened, stored = self.opened, self.source.stored.fields.items()
        dtype = next((f.dtype for name, f in stored if name.endswith(".weight")), torch.float32)
        untied = opened.config.head_bits is not None
        quantization = self._config().to_dict()
        opened.files.describe(directory, opened.skeleton, opened.tokenizer, dtype, quantization, untied)
        if self.mixed is not None:
            write_json(directory / PLAN_FILE, self.mixed.to_dict())

    def report(self) -> dict[str, Any]:
        """Return the content of pairquant.json: recipe, provenance, and each linear's error and size."""
        files, errors = self.opened.files, self.errors
        layouts = {path: self.opened.plan.layouts[path] for path in errors}
        pools = {p: s.transform_name for p, s in self.opened.sites.items() if s.transform_name is not None}
        revised = self.journal.revised or {}
        seconds = sum(entry["seconds"] for entry in self.journal.entries) + revised.get("seconds", 0.0)
        return {
            "config": self.opened.config.to_dict(),
            "provenance": self._provenance(),
            "bits_per_weight": bits_per_weight(layouts, pools),
            "readme_sha256": None if files.gguf else readme_digest(files.directory),
            "seconds": round(seconds, 1),
            **({END_TO_END: revised["kl"]} if revised else {}),
            "linears": {
                path: {"error": error, "bytes": layouts[path].stored_bits() // 8} for path, error in errors.items()
            },
        }

    def _entries(self) -> dict[str, Entry]:
        """Return every tensor of the checkpoint: the source's, and in place of quantized ones what became of them."""
        entries = {}
        quantized = self.errors
        sites = [site for path, site in self.opened.sites.items() if path in quantized]
        for name, stored in self.source.plain_fields(sites, self.opened.names).items():
            entries[name] = Entry(stored, lambda name=name: self.source.load_stored(name))  # type: ignore[misc]
        if (site := self.opened.embedding) is not None and self.embedding is not None:
            for name, tensor in self.embedding[0].tensors.items():
                field = Field(tensor.dtype, tuple(tensor.shape))
                entries[site.stored_name(name)] = Entry(field, lambda tensor=tensor: tensor)  # type: ignore[misc]
        for index in range(self.journal.count):
            block = self.journal.stored(index)
            for name, stored in block.fields.items():
                entries[name] = Entry(stored, lambda block=block, name=name: block.load(name))  # type: ignore[misc]
        return entries

    def _config(self) -> CheckpointConfig:
        quantized, names = self.errors, self.opened.names
        linears = [p for p, module in self.opened.skeleton.named_modules() if is_linear(module)]
        unknown = [name.removesuffix(".weight") for name in self._unknown_matrices()]
        plain = [*(path for path in map(names.module, linears) if path not in quantized), *unknown]
        return CheckpointConfig.of_plan(
            self.opened.plan,
            modules_to_not_convert=tuple(plain),
            shared_rotations=tuple(tuple(group) for entry in self.journal.entries for group in entry["shared"]),
            transform_per_expert=self.opened.config.transform_per_expert,
            provenance=self._provenance(),
        )

    def _unknown_matrices(self) -> list[str]:
        """Return the source's matrices that the model's class does not use, so that nothing here quantizes them."""
        stored = (self.source.originals or self.source.stored).fields
        return [n for n in self.opened.names.unknown if n.endswith(".weight") and len(stored[n].shape) == 2]

    def _folding(self) -> dict[str, Any]:
        """Return what the provenance says of a source that `fold` wrote: its own source, and what was folded; else nothing."""
        files = self.opened.files
        facts = {} if files.gguf else read_record(files.directory / REPORT_FILE).get(FOLDED)
        if not isinstance(facts, Mapping) or not isinstance(facts.get("from"), str):
            return {}
        kept = {name: facts[name] for name in ("stream", "norms", "pairs", "reason") if name in facts}
        return {"source": facts["from"], "transform": "folded", FOLDED: kept}

    def _provenance(self) -> dict[str, Any]:
        config, calibration = self.opened.config, self.texts.calibration
        provenance = {
            "tool": f"pairquant {__version__}",
            "source": self.opened.files.name,
            "preset": config.preset,
            "seed": config.seed,
            **self._folding(),
        }
        if calibration is not None:
            provenance |= {
                "calibration": list(calibration.sources),
                "calibration_tokens": list(calibration.tokens.shape),
                "calibration_sha256": calibration.digest,
            }
            if calibration.bos:
                provenance["bos"] = True
        if self.texts.whole is not None:
            provenance["end_to_end_tokens"] = list(self.texts.whole.shape)
        return provenance
