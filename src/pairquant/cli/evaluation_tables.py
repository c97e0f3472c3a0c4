"""Print what `pairquant eval` measured: a table for each part that was asked for, none wider than 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..support.formatting import departs
from .app import console
from .display import number

BARS = "▁▂▃▄▅▆▇█"


def show(results: dict[str, Any]) -> None:
    """Print the results of `jobs.evaluate`."""
    _print(_texts(results["texts"]))
    if chains := results.get("chains"):
        _print(_chains(chains))
    if answers := accuracy_cells(results):
        _print(_accuracies(answers, results["reference"] is not None))


def accuracy_cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Of each set of problems and task: name, accuracy, the original's, and the three cells of `_pair`."""
    return [*_answers(results.get("answers", {})), *_tasks(results.get("tasks"))]


def _print(table: Table) -> None:
    console.print(table)
    console.print()


def measurements(first: str, columns: Iterable[str]) -> Table:
    """A table of numbers, each row named in the first column."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _texts(texts: dict[str, Any]) -> Table:
    """Perplexity of each text, and the distance from the original where there is one."""
    compared = any(row["kl"] is not None for row in texts.values())
    table = measurements("text", ("tokens", "perplexity", *(("KL, along windows", "top-1 kept") if compared else ())))
    for name, row in texts.items():
        distance = (divergence(row), number(row["top1"], 4)) if compared else ()
        table.add_row(escape(Path(name).name), f"{row['tokens']:,}", perplexity(row["perplexity"]), *distance)
    return table


def perplexity(value: float) -> str:
    """A perplexity in at most nine characters: that of a broken model may have twenty digits."""
    return f"{value:.3f}" if value < 100_000 else f"{value:.2e}"


def _chains(row: dict[str, Any]) -> Table:
    lines = {
        "sampled": f"{row['chains']}, {row['tokens']:,} tokens; {row['finished']:.0%} ended by themselves",
        "KL along them": divergence(row),
        "greedy decoding departs": departs(row["departure_median"]),
        "never departs": f"{row['never_departed']:.0%}",
    }  # fmt: skip
    table = measurements("the original's chains", ())
    table.add_column()
    for name, value in lines.items():
        table.add_row(name, value)
    return table


def _answers(answers: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    for name, each in answers.items():
        ours, theirs = each["model"], each["reference"]
        yield (
            f"{escape(Path(name).name)}, {ours['problems']:,}",
            _accuracy(ours),
            _accuracy(theirs) if theirs else "",
            *_pair(each["paired"]),
        )


def _tasks(tasks: dict[str, Any] | None) -> Iterable[tuple[str, ...]]:
    if tasks is None:
        return
    for task, metrics in tasks["model"].items():
        for name, metric in metrics.items():
            yield (
                escape(f"{task} {name}") + (f", {len(metric['outcomes']):,}" if metric["outcomes"] else ""),
                _with_error(name, metric),
                _with_error(name, tasks["reference"][task][name]) if tasks["reference"] else "",
                *_pair((tasks["paired"] or {}).get(task, {}).get(name)),
            )


def _pair(paired: dict[str, Any] | None) -> tuple[str, ...]:
    if paired is None:
        return "", "", ""
    return f"−{paired['lost']} +{paired['gained']}", number(paired["p_value"], 2), number(paired["no_worse"], 2)


def _accuracies(rows: Sequence[tuple[str, ...]], paired: bool) -> Table:
    columns = ("accuracy, %", "original", "changed", "p", "no worse") if paired else ("accuracy, %",)
    table = measurements("answers", columns)
    for name, *cells in rows:
        table.add_row(name, *cells[: len(columns)])
    return table


def divergence(row: dict[str, Any]) -> str:
    """ "0.0604 ± 0.0055 █▅▆▆▅▄▄▅": the mean, half its interval, and by position."""
    if row["kl"] is None:
        return ""
    low, high = row["kl_interval"] or (None, None)
    reach = "" if low is None else f" [dim]± {(high - low) / 2:.4f}[/]"
    return f"{row['kl']:.4f}{reach} {_by_position(row['kl_by_position'])}"


def _accuracy(row: dict[str, Any]) -> str:
    """ "85.1 [83.0, 87.0]", in percent."""
    low, high = row["interval"]
    return rf"{100 * row['accuracy']:.1f} [dim]\[{100 * low:.1f}, {100 * high:.1f}][/]"


def _with_error(name: str, metric: dict[str, Any]) -> str:
    """Of a task's metric: accuracies in percent, others as they are."""
    scale, digits = (100, 1) if name.startswith(("acc", "exact_match")) else (1, 3)
    value = f"{scale * metric['value']:.{digits}f}"
    return value if metric["stderr"] is None else f"{value} [dim]± {scale * metric['stderr']:.{digits}f}[/]"


def _by_position(parts: Sequence[dict[str, float]]) -> str:
    """A bar for each part, from 0 to the highest."""
    values = [part["kl"] for part in parts]
    highest = max(values, default=0.0) or 1.0
    return "".join(BARS[max(0, min(7, round(7 * value / highest)))] for value in values)
