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

from ..checkpoint.files import durable
from ..evaluation.quality import Quality
from ..evaluation.results import ChainResults
from ..spec.activations import UNROUNDED
from ..spec.linear import bits_per_weight
from ..support.errors import ConfigError
from ..support.formatting import (
    counted,
    departs,
    departure,
    duration,
    number,
    percent,
    plain,
    size,
    source_names,
    token_count,
)
from ..support.version import __version__
from .facts import CheckpointFacts, LinearFacts, ReportFacts, gather
from .images import require_browser, write_images
from .results import CHAINS, Accuracy, Evaluation, Measured, Speed, SpeedRow

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
    """What one tab shows. plots: the place of each in the page → `style.Plot`; recipe: JSON, if recorded."""

    label: str
    cards: list[Card]
    plots: Mapping[str, Any]
    tables: list[Table]
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

    results: files of `pairquant eval --json`, `compare --json` and `bench --json`; linear: whose weight is shown, see
    `gather`. Raises `ConfigError`, before anything is read, for places that cannot be written and for what is not
    installed; then what `gather` raises.
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
            {key: plot for panel in panels for key, plot in panel.plots.items()},
            images,
            drawing.style.template("light"),
        )


def _require_place(output: Path, images: Path | None) -> None:
    if output.suffix != ".html":
        raise ConfigError(f"output {str(output)!r} must end in .html; an existing page of that name is replaced")
    for path in (output, images):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{str(path)!r} cannot be written: there is no directory {str(path.absolute().parent)!r}")
    if images is not None and images.exists() and not images.is_dir():
        raise ConfigError(f"figures {str(images)!r} is a file, must be a directory or not exist yet")


@dataclass(frozen=True)
class Drawing:
    """The modules that need Plotly."""

    figures: ModuleType
    style: ModuleType


def _drawing() -> Drawing:
    """Raise `ConfigError` without Plotly."""
    try:
        from . import figures, style
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "plotly":
            raise
        raise ConfigError("a report needs the package plotly: pip install 'pairquant[report]'") from error
    return Drawing(figures, style)


def _render(panels: list[Panel], drawing: Drawing) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    data = {
        "figures": {key: plot.to_dict() for panel in panels for key, plot in panel.plots.items()},
        "templates": {theme: drawing.style.template(theme) for theme in ("light", "dark")},
    }
    return environment.get_template("page.html").render(
        panels=panels, data=data, plotly=drawing.style.plotly_js(), version=__version__,
        style=(HERE / "page.css").read_text(), script=(HERE / "page.js").read_text(),
    )  # fmt: skip


def _panels(facts: ReportFacts, drawing: Drawing) -> list[Panel]:
    """Return one per checkpoint, and before them a comparison if there is more than one model to compare."""
    panels, strokes = [], drawing.figures.strokes(facts)
    known = {checkpoint.name for checkpoint in facts.checkpoints}
    others = [name for name in facts.measured.names() if name not in known]
    if len(facts.checkpoints) + len(others) > 1:
        plots = {f"compared-{plot.key}": plot for plot in drawing.figures.comparison_plots(facts, strokes)}
        panels.append(
            Panel("Side by side", [], plots, [_comparison_table(facts, others), *_measured_tables(facts.measured)])
        )
    for place, checkpoint in enumerate(facts.checkpoints, 1):
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", checkpoint.name)
        plots = {f"{place}-{slug}-{plot.key}": plot for plot in drawing.figures.checkpoint_plots(checkpoint, strokes)}
        remarks = [f"Weights: {checkpoint.remark}.", *_missing(checkpoint)]
        config = checkpoint.checkpoint.report.get("config")
        recipe = json.dumps(config, indent=1) if config else None
        tables = [*_measured_tables(checkpoint.measured), _linear_table(checkpoint.linears)]
        panels.append(Panel(checkpoint.name, _cards(checkpoint), plots, tables, remarks, recipe))
    return panels


def _missing(facts: CheckpointFacts) -> list[str]:
    """Return what the checkpoint's files do not tell, in words."""
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
    shape = "; ".join(facts.checkpoint.specs())
    shared = f", {len(config.shared_rotations)} shared transforms" if config.shared_rotations else ""
    cards = [
        Card(
            "bits per weight",
            f"{facts.checkpoint.bits_per_weight():.2f}",
            f"in {counted(len(facts.linears), 'linear layer')}",
        ),
        Card("size", size(facts.size), f"{size(facts.size_16_bit)} in 16 bits"),
        Card("preset", plain(provenance.get("preset", "not recorded")), shape + shared),
    ]
    if (activations := facts.checkpoint.activations()) != UNROUNDED:
        cards.append(Card("activations", activations, "what layers round their inputs to when they run"))
    if errors := [linear.error for linear in facts.linears if linear.error is not None]:
        cards.append(Card("mean error", f"{percent(sum(errors) / len(errors))} %", "of a layer's output"))
    if "seconds" in report:
        cards.append(Card("quantized in", duration(report["seconds"]), plain(provenance.get("tool", ""))))
    if facts.checkpoint.trained_whole is not None:
        before, after = facts.checkpoint.trained_whole
        cards.append(Card("trained as a whole", f"{after:.4f}", f"KL on text held out, before it {before:.4f}"))
    if texts := provenance.get("calibration"):
        cards.append(
            Card(
                "calibration", token_count(provenance.get("calibration_tokens")) or "not recorded", source_names(texts)
            )
        )
    return cards + _measured_cards(facts.measured)


def _measured_cards(measured: Measured) -> list[Card]:
    cards = []
    for evaluation in measured.evaluations:
        cards += [_text_card(text, row) for text, row in evaluation.texts.items()]
        cards += [_chains_card(evaluation.chains)] if evaluation.chains else []
        cards += [_accuracy_card(accuracy) for accuracy in evaluation.accuracies]
    return cards + [_speed_card(speed) for speed in measured.speeds]


def _text_card(text: str, quality: Quality) -> Card:
    values = {
        measure: f"{label} {number(value, digits)}"
        for measure, (label, digits) in MEASURES.items()
        if (value := getattr(quality, measure)) is not None
    }
    first = next(iter(values))
    label, _, value = values.pop(first).rpartition(" ")
    return Card(f"{label}, {text}", value, ", ".join([*values.values(), f"{quality.tokens:,} tokens"]))


def _chains_card(chains: ChainResults) -> Card:
    note = f"decoding departs {departs(chains.departure_median)}; {chains.tokens:,} tokens"
    return Card(f"KL, {CHAINS}", f"{chains.kl:.4f}", note)


def _accuracy_card(accuracy: Accuracy) -> Card:
    original = "" if accuracy.original is None else f"the original {100 * accuracy.original:.1f} %"
    worse = "" if accuracy.no_worse is None else f"no worse: {accuracy.no_worse:.2f}"
    return Card(accuracy.name, f"{100 * accuracy.value:.1f} %", ", ".join(filter(None, (original, worse))))


def _speed_card(speed: Speed) -> Card:
    row = speed.rows[0]
    return Card("decoding", f"{row.decode_tokens_per_s:,.1f}/s", f"tokens, batch {row.batch}; {speed.setting}")


def _measured_tables(measured: Measured) -> list[Table]:
    """Return the tables of answers and of speed, as far as there are any."""
    answers = [_answer_cells(e, accuracy) for e in measured.evaluations for accuracy in e.accuracies]
    speeds = [_speed_cells(speed, row) for speed in measured.speeds for row in speed.rows]
    columns = [
        "model", "problems", "questions", "accuracy, %", "from", "to", "original, %", "lost", "gained", "p", "no worse",
    ]  # fmt: skip
    of_speed = [
        "model", "batch", "prefill, tokens/s", "decoding, tokens/s", "first token, ms", "peak memory", "measured with",
    ]  # fmt: skip
    tables = [Table("Answers", columns, answers), Table("Speed", of_speed, speeds)]
    return [table for table in tables if table.rows]


def _answer_cells(evaluation: Evaluation, accuracy: Accuracy) -> list[Cell]:
    ends = accuracy.interval or (None, None)
    shares = [None if share is None else 100 * share for share in (accuracy.value, *ends, accuracy.original)]
    counts = (accuracy.lost, accuracy.gained)
    return [
        Cell(evaluation.name, evaluation.name),
        Cell(accuracy.name, accuracy.name),
        Cell.of(accuracy.questions, 0),
        *(Cell.of(share, 1) for share in shares),
        *(Cell.of(count, 0) for count in counts),
        Cell.of(accuracy.p_value, 2),
        Cell.of(accuracy.no_worse, 2),
    ]


def _speed_cells(speed: Speed, row: SpeedRow) -> list[Cell]:
    return [
        Cell(speed.name, speed.name),
        Cell.of(row.batch, 0),
        Cell.of(row.prefill_tokens_per_s, 1),
        Cell.of(row.decode_tokens_per_s, 1),
        Cell.of(1000 * row.first_token_s, 0),
        _size_cell(speed.peak_memory_bytes),
        Cell(speed.setting, speed.setting),
    ]


def _size_cell(count: float | None) -> Cell:
    return Cell("" if count is None else size(count), count)


def _duration_cell(seconds: float | None) -> Cell:
    return Cell("" if seconds is None else duration(seconds), seconds)


def _linear_table(linears: list[LinearFacts]) -> Table:
    columns = [
        "layer", "block", "shape", "bits", "group", "rotations", "error, %", "bits per weight", "outliers before", "outliers after",
        "group range before", "group range after", "largest angle",
    ]  # fmt: skip
    rows = [
        [
            Cell(linear.path, linear.path),
            Cell(linear.block, int(linear.block) if linear.block else None),
            Cell(f"{linear.layout.out_features} × {linear.layout.in_features}", linear.layout.out_features * linear.layout.in_features),
            Cell.of(linear.layout.bits, 0),
            Cell.of(linear.layout.group_size, 0),
            Cell.of(linear.layout.rotations, 0),
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


def _comparison_table(facts: ReportFacts, others: Sequence[str]) -> Table:
    """Return a row per checkpoint, and per measured model that is none of them; `activations` only where some are rounded."""
    texts = dict.fromkeys(
        (text, m) for e in facts.measured.evaluations for text in e.texts for m in ("kl", "perplexity")
    )
    columns = ["model", "bits per weight", "activations", "size", "preset", "mean error, %", "quantized in"]
    columns += [f"{MEASURES[m][0]}, {text}" for text, m in texts]
    followed = any(e.chains for e in facts.measured.evaluations)
    columns += [f"KL, {CHAINS}", "departs at token"] if followed else []
    known = [(_comparison_cells(checkpoint), checkpoint.measured) for checkpoint in facts.checkpoints]
    for name in others:
        measured = facts.measured.of(name)
        known.append((_other_cells(name, measured.evaluations), measured))
    rows = [
        [*cells, *_text_cells(texts, measured), *(_chain_cells(measured) if followed else ())]
        for cells, measured in known
    ]
    at = columns.index("activations")
    if all(row[at].text in ("", UNROUNDED) for row in rows):
        columns, rows = columns[:at] + columns[at + 1 :], [row[:at] + row[at + 1 :] for row in rows]
    return Table("Models", columns, rows)


def _comparison_cells(facts: CheckpointFacts) -> list[Cell]:
    errors = [linear.error for linear in facts.linears if linear.error is not None]
    error = sum(errors) / len(errors) if errors else None
    preset = plain((facts.checkpoint.config.provenance or {}).get("preset", ""))
    return [
        Cell(facts.name, facts.name),
        Cell.of(facts.checkpoint.bits_per_weight(), 2),
        Cell(facts.checkpoint.activations(), facts.checkpoint.activations()),
        _size_cell(facts.size),
        Cell(preset, preset),
        Cell(percent(error), error),
        _duration_cell(facts.checkpoint.report.get("seconds")),
    ]


def _other_cells(name: str, evaluations: Sequence[Evaluation]) -> list[Cell]:
    """Return what is known of a model without its files."""
    known = evaluations[0] if evaluations else Evaluation(name, None, None, {})
    return [
        Cell(name, name),
        Cell.of(known.bits_per_weight, 2),
        Cell(known.activations or "", known.activations),
        _size_cell(known.size_bytes),
        Cell("", None),
        Cell("", None),
        _duration_cell(known.quantized_in_s),
    ]


def _chain_cells(measured: Measured) -> list[Cell]:
    chains = next((e.chains for e in measured.evaluations if e.chains), None)
    if chains is None:
        return [Cell("", None), Cell("", None)]
    median = chains.departure_median
    rank = chains.plan.tokens if median is None else median
    return [Cell.of(chains.kl, MEASURES["kl"][1]), Cell(departure(median), rank)]


def _text_cells(texts: Iterable[tuple[str, str]], measured: Measured) -> list[Cell]:
    found = {text: quality for each in measured.evaluations for text, quality in each.texts.items()}
    return [Cell.of(getattr(found.get(text), measure, None), MEASURES[measure][1]) for text, measure in texts]
