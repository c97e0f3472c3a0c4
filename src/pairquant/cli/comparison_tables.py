"""Print what `pairquant compare` measured: a table for each part that was asked for, models one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from ..evaluation.ranking import Ranking
from ..evaluation.results import Compared, Comparison
from ..spec.activations import UNROUNDED
from ..support.formatting import departure, distinct_ends
from .app import console
from .display import duration, number, size
from .evaluation_tables import NAME_WIDTH, accuracy_cells, divergence, measurements, perplexity, row_name, text_names

#: As they are named here, and what was found.
Rows = Sequence[tuple[str, Compared]]
#: Letters of a model's name beside many numbers.
NARROW = 16


def show(found: Comparison) -> None:
    """Print a table for each part that was asked for."""
    rows = found.rows
    named = list(zip(distinct_ends([Path(row.name) for row in rows]), rows, strict=True))
    console.print(_models(named))
    for label, (text, ranking) in zip(text_names(found.closest), found.closest.items(), strict=True):
        console.print()
        console.print(_text(label, text, named, ranking))
    if found.closest_along_chains:
        console.print()
        console.print(_chains(named, found.closest_along_chains))
    if (answered := _answers(named)).row_count:
        console.print()
        console.print(answered)


def _models(rows: Rows) -> Table:
    speeds = ("prefill", "decode") if rows[0][1].speed else ()
    rounded = any(row.evaluation.activations not in (None, UNROUNDED) for _, row in rows)
    columns = ["bits per weight", "size", "quantized in"]
    if rounded:  # in two lines, so that all columns still fit
        columns = ["bits per\nweight", "activa-\ntions", "size", "quantized\nin"]
    width = NARROW if rounded and speeds else NAME_WIDTH
    table = measurements("model", (*columns, *speeds))
    for label, row in rows:
        fast = row.speed.rows[0] if row.speed else None
        table.add_row(
            row_name(label, width),
            number(row.evaluation.bits_per_weight, 2),
            *((row.evaluation.activations or "",) if rounded else ()),
            "" if row.size_bytes is None else size(row.size_bytes),
            "" if row.quantized_in_s is None else duration(row.quantized_in_s),
            *(f"{rate:,.1f}/s" for rate in ((fast.prefill_tokens_per_s, fast.decode_tokens_per_s) if fast else ())),
        )
    return table


def _text(label: str, text: str, rows: Rows, ranking: Ranking) -> Table:
    """Show one text. The last column says how much further a model is from the original than the closest one is."""
    table = measurements(
        row_name(label, NARROW), ("perplexity", "KL, along windows", "top-1\nkept", "behind the\nclosest")
    )
    for name, row in rows:
        found = row.evaluation.texts[text]
        table.add_row(
            row_name(name, NARROW),
            perplexity(found.perplexity),
            divergence(found),
            number(found.top1, 4),
            _behind(row, ranking),
        )
    return table


def _chains(rows: Rows, ranking: Ranking) -> Table:
    table = measurements("chains", ("KL, along chains", "departs\nat token", "never", "behind the\nclosest"))
    for name, row in rows[1:]:
        if found := row.evaluation.chains:
            departs, never = departure(found.departure_median), f"{found.never_departed:.0%}"
            table.add_row(row_name(name, NARROW), divergence(found), departs, never, _behind(row, ranking))
    return table


def _behind(row: Compared, ranking: Ranking) -> str:
    if row.name == ranking.model:
        return "closest"
    gap = ranking.ahead_of.get(row.name)
    if gap is None:
        return ""
    reach = "" if gap.interval is None else f" [dim]± {(gap.interval[1] - gap.interval[0]) / 2:.4f}[/]"
    return f"{gap.kl:+.4f}{reach}"


def _answers(rows: Rows) -> Table:
    """Return a row for each set of problems or task and model, paired with the original."""
    table = measurements("answers", ("model", "accuracy, %", "changed", "p", "no worse"))
    for label, row in rows[1:]:
        for name, accuracy, _, *pair in accuracy_cells(row.evaluation):
            table.add_row(name, row_name(label, NARROW), accuracy, *pair)
    return table
