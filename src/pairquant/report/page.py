"""One HTML file that holds the whole report: facts in words, figures, tables, and all that they need to be shown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .. import __version__
from ..checkpoint.files import durable
from ..errors import ConfigError
from ..layout import bits_per_weight
from ..wording import duration, number, percent, plain, size
from .facts import CheckpointFacts, Evaluation, LinearFacts, ReportFacts, gather
from .images import require_browser, write_images

HERE = Path(__file__).parent
#: What is written of an evaluation's measures, and with how many digits.
MEASURES = {"kl": ("KL", 4), "perplexity": ("perplexity", 3), "top1": ("top-1 kept", 4)}


@dataclass(frozen=True)
class Card:
    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """rank: what the column is sorted by; None sorts last."""

    text: str
    rank: float | str | None

    @classmethod
    def of(cls, value: float | None, digits: int) -> Cell:
        return cls(number(value, digits), value)


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Panel:
    """What one tab shows. plots: the place of each in the page → `figures.Plot`; recipe: JSON, if recorded."""

    label: str
    cards: list[Card]
    plots: Mapping[str, Any]
    table: Table
    remarks: list[str] = field(default_factory=list)
    recipe: str | None = None


def write_report(
    models: Sequence[str | Path],
    output: str | Path = "report.html",
    *,
    results: Iterable[str | Path] = (),
    linear: str | None = None,
    figures: str | Path | None = None,
    on_linears: Callable[[str, int], Callable[[], None]] | None = None,
) -> None:
    """Write a page of these checkpoints to `output`, replacing it, and their figures as SVG and PNG into `figures`.

    results: files of `pairquant eval --json`; linear: whose weight is shown, see `gather`. Raises `ConfigError`, before
    anything is read, for places that cannot be written and for what is not installed; then what `gather` raises.
    """
    output, images = Path(output), None if figures is None else Path(figures)
    _require_place(output, images)
    drawing = _drawing()
    if images is not None:
        require_browser()
    facts = gather(models, map(Path, results), linear, on_linears)
    panels = _panels(facts, drawing)
    page = _render(panels, drawing)
    durable(output, lambda staged: staged.write_text(page, encoding="utf-8"))
    if images is not None:
        write_images(
            {key: plot for panel in panels for key, plot in panel.plots.items()}, images, drawing.template("light")
        )


def _require_place(output: Path, images: Path | None) -> None:
    if output.suffix != ".html":
        raise ConfigError(f"output {str(output)!r} must end in .html; an existing page of that name is replaced")
    for path in (output, images):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{str(path)!r} cannot be written: there is no directory {str(path.absolute().parent)!r}")
    if images is not None and images.exists() and not images.is_dir():
        raise ConfigError(f"figures {str(images)!r} is a file, must be a directory or not exist yet")


def _drawing() -> ModuleType:
    """`figures`, which alone needs Plotly."""
    try:
        from . import figures
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "plotly":
            raise
        raise ConfigError("a report needs the package plotly: pip install 'pairquant[report]'") from error
    return figures


def _render(panels: list[Panel], drawing: ModuleType) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    data = {
        "figures": {key: plot.to_dict() for panel in panels for key, plot in panel.plots.items()},
        "templates": {theme: drawing.template(theme) for theme in ("light", "dark")},
    }
    return environment.get_template("page.html").render(
        panels=panels, data=data, plotly=drawing.plotly_js(), version=__version__,
        style=(HERE / "page.css").read_text(), script=(HERE / "page.js").read_text(),
    )  # fmt: skip


def _panels(facts: ReportFacts, drawing: ModuleType) -> list[Panel]:
    """One per checkpoint, and before them a comparison if there is more than one model to compare."""
    panels = []
    known = {checkpoint.name for checkpoint in facts.checkpoints}
    others = [evaluation for evaluation in facts.evaluations if evaluation.name not in known]
    if len(facts.checkpoints) + len(others) > 1:
        plots = drawing.comparison_plots(facts.checkpoints, facts.evaluations)
        table = _comparison_table(facts.checkpoints, others)
        panels.append(Panel("Side by side", [], {f"compared-{plot.key}": plot for plot in plots}, table))
    for place, checkpoint in enumerate(facts.checkpoints, 1):
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", checkpoint.name)
        plots = {f"{place}-{slug}-{plot.key}": plot for plot in drawing.checkpoint_plots(checkpoint)}
        remarks = [f"Weights: {checkpoint.remark}.", *_missing(checkpoint)]
        config = checkpoint.checkpoint.report.get("config")
        recipe = json.dumps(config, indent=1) if config else None
        panels.append(
            Panel(checkpoint.name, _cards(checkpoint), plots, _linear_table(checkpoint.linears), remarks, recipe)
        )
    return panels


def _missing(facts: CheckpointFacts) -> list[str]:
    """What the checkpoint's files do not tell, in words."""
    missing = []
    if all(linear.error is None for linear in facts.linears):
        missing.append("No errors were recorded (no pairquant.json).")
    if not facts.blocks:
        missing.append("No log was kept (no pairquant.jsonl): times per block are not known.")
    return missing


def _cards(facts: CheckpointFacts) -> list[Card]:
    config, report, provenance = (
        facts.checkpoint.config,
        facts.checkpoint.report,
        facts.checkpoint.config.provenance or {},
    )
    shape = f"{config.bits} bits, groups of {config.group_size}, {config.rotations} rotations"
    shared = f", {len(config.shared_rotations)} shared transforms" if config.shared_rotations else ""
    cards = [
        Card("bits per weight", f"{facts.checkpoint.bits_per_weight():.2f}", f"in {len(facts.linears)} linear layers"),
        Card("size", size(facts.size), f"{size(facts.size_16_bit)} in 16 bits"),
        Card("preset", plain(provenance.get("preset", "not recorded")), shape + shared),
    ]
    if errors := [linear.error for linear in facts.linears if linear.error is not None]:
        cards.append(Card("mean error", f"{percent(sum(errors) / len(errors))} %", "of a layer's output"))
    if "seconds" in report:
        cards.append(Card("quantized in", duration(report["seconds"]), plain(provenance.get("tool", ""))))
    if texts := provenance.get("calibration"):
        cards.append(Card("calibration", _tokens(provenance.get("calibration_tokens")), _names(texts)))
    return cards + [card for evaluation in facts.evaluations for card in _measured(evaluation)]


def _tokens(shape: Any) -> str:
    return f"{shape[0]} × {shape[1]} tokens" if isinstance(shape, list) and len(shape) == 2 else "not recorded"


def _names(texts: Any) -> str:
    """Directories of the machine that quantized say nothing to others."""
    names = texts if isinstance(texts, list) else [texts]
    return ", ".join(Path(name).name if Path(name).is_absolute() else name for name in map(str, names))


def _measured(evaluation: Evaluation) -> list[Card]:
    cards = []
    for text, row in evaluation.texts.items():
        values = {
            m: f"{label} {number(row[m], digits)}" for m, (label, digits) in MEASURES.items() if row.get(m) is not None
        }
        first = next(iter(values))
        label, _, value = values.pop(first).rpartition(" ")
        cards.append(Card(f"{label}, {text}", value, ", ".join([*values.values(), f"{row['tokens']:,} tokens"])))
    return cards


def _linear_table(linears: list[LinearFacts]) -> Table:
    columns = [
        "layer", "block", "shape", "error, %", "bits per weight", "outliers before", "outliers after",
        "group range before", "group range after", "largest angle",
    ]  # fmt: skip
    rows = [
        [
            Cell(linear.path, linear.path),
            Cell(linear.block, int(linear.block) if linear.block else None),
            Cell(f"{linear.layout.out_features} × {linear.layout.in_features}", linear.layout.out_features * linear.layout.in_features),
            Cell(percent(linear.error), linear.error),
            Cell.of(bits_per_weight([linear.layout]), 3),
            Cell.of(linear.outliers_before, 2),
            Cell.of(linear.outliers_after, 2),
            Cell.of(linear.range_before, 3),
            Cell.of(linear.range_after, 3),
            Cell.of(linear.largest_angle, 3),
        ]
        for linear in linears
    ]  # fmt: skip
    return Table("Every layer", columns, rows)


def _comparison_table(checkpoints: list[CheckpointFacts], others: list[Evaluation]) -> Table:
    """A row per checkpoint, and per evaluated model that is none of them."""
    evaluations = [e for facts in checkpoints for e in facts.evaluations] + others
    measured = list(dict.fromkeys((text, m) for e in evaluations for text in e.texts for m in ("kl", "perplexity")))
    columns = ["model", "bits per weight", "size", "preset", "mean error, %", "quantized in"]
    columns += [f"{MEASURES[m][0]}, {text}" for text, m in measured]
    rows = []
    for facts in checkpoints:
        rows.append([*_comparison_cells(facts), *_measured_cells(measured, facts.evaluations)])
    for other in others:
        blank = [Cell("", None)] * 4
        rows.append(
            [
                Cell(other.name, other.name),
                Cell.of(other.bits_per_weight, 2),
                *blank,
                *_measured_cells(measured, [other]),
            ]
        )
    return Table("Models", columns, rows)


def _comparison_cells(facts: CheckpointFacts) -> list[Cell]:
    errors = [linear.error for linear in facts.linears if linear.error is not None]
    error = sum(errors) / len(errors) if errors else None
    preset = plain((facts.checkpoint.config.provenance or {}).get("preset", ""))
    seconds = facts.checkpoint.report.get("seconds")
    return [
        Cell(facts.name, facts.name),
        Cell.of(facts.checkpoint.bits_per_weight(), 2),
        Cell(size(facts.size), facts.size),
        Cell(preset, preset),
        Cell(percent(error), error),
        Cell("" if seconds is None else duration(seconds), seconds),
    ]


def _measured_cells(measured: list[tuple[str, str]], evaluations: list[Evaluation]) -> list[Cell]:
    """The last evaluation that has a text counts."""
    rows = {text: row for evaluation in evaluations for text, row in evaluation.texts.items()}
    return [Cell.of(rows.get(text, {}).get(measure), MEASURES[measure][1]) for text, measure in measured]
