"""Print what `pairquant eval` measured: a table for each part that was asked for, none wider than 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from ..evaluation.quality import Part, Quality
from ..evaluation.reasoning import Answers, Paired
from ..evaluation.results import AnswerResults, ChainResults, Evaluation, TaskResults
from ..evaluation.tasks import Metric
from ..support.formatting import departs, distinct_ends
from .app import console
from .display import in_lines, number

BARS = "▁▂▃▄▅▆▇█"
#: Letters of a name in the first column; longer ones take several lines.
NAME_WIDTH = 24


def show(found: Evaluation) -> None:
    """Print everything that was measured."""
    _print(_texts(found.texts))
    if found.chains:
        _print(_chains(found.chains))
    if answers := accuracy_cells(found):
        _print(_accuracies(answers, found.reference is not None))


def accuracy_cells(found: Evaluation) -> list[tuple[str, ...]]:
    """Return a row for each set of problems and each task: name, accuracy, the original's, and the three cells of `_pair`."""
    return [*_answers(found.answers or {}), *_tasks(found.tasks)]


def _print(table: Table) -> None:
    console.print(table)
    console.print()


def measurements(first: str, columns: Iterable[str]) -> Table:
    """Make a table of numbers, each row named in the first column."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def row_name(name: str, width: int = NAME_WIDTH) -> str:
    """Return a name for the first column, in lines of about this width."""
    return escape(in_lines(name, width))


def _texts(texts: Mapping[str, Quality]) -> Table:
    """Return perplexity of each text, and the distance from the original where there is one."""
    compared = any(quality.kl is not None for quality in texts.values())
    table = measurements("text", ("tokens", "perplexity", *(("KL, along windows", "top-1 kept") if compared else ())))
    for name, quality in zip(text_names(texts), texts.values(), strict=True):
        distance = (divergence(quality), number(quality.top1, 4)) if compared else ()
        table.add_row(row_name(name), f"{quality.tokens:,}", perplexity(quality.perplexity), *distance)
    return table


def text_names(texts: Iterable[str]) -> list[str]:
    """Return what texts are called in tables: as much of a path's end as tells it from the others."""
    return distinct_ends([Path(name) for name in texts])


def perplexity(value: float) -> str:
    """Return a perplexity in at most nine characters: that of a broken model may have twenty digits."""
    return f"{value:.3f}" if value < 100_000 else f"{value:.2e}"


def _chains(found: ChainResults) -> Table:
    lines = {
        "sampled": f"{found.chains}, {found.tokens:,} tokens; {found.finished:.0%} ended by themselves",
        "KL along them": divergence(found),
        "greedy decoding departs": departs(found.departure_median),
        "never departs": f"{found.never_departed:.0%}",
    }
    table = measurements("the original's chains", ())
    table.add_column()
    for name, value in lines.items():
        table.add_row(name, value)
    return table


def _answers(answers: Mapping[str, AnswerResults]) -> Iterable[tuple[str, ...]]:
    for name, each in answers.items():
        yield (
            row_name(f"{Path(name).name}, {each.model.problems:,}"),
            _accuracy(each.model),
            _accuracy(each.reference) if each.reference else "",
            *_pair(each.paired),
        )


def _tasks(tasks: TaskResults | None) -> Iterable[tuple[str, ...]]:
    if tasks is None:
        return
    for task, metrics in tasks.model.items():
        for name, metric in metrics.items():
            count = f", {len(metric.outcomes):,}" if metric.outcomes else ""
            yield (
                row_name(f"{task} {name}{count}"),
                _with_error(name, metric),
                _with_error(name, tasks.reference[task][name]) if tasks.reference else "",
                *_pair((tasks.paired or {}).get(task, {}).get(name)),
            )


def _pair(paired: Paired | None) -> tuple[str, ...]:
    if paired is None:
        return "", "", ""
    return f"−{paired.lost} +{paired.gained}", number(paired.p_value, 2), number(paired.no_worse, 2)


def _accuracies(rows: Sequence[tuple[str, ...]], paired: bool) -> Table:
    columns = ("accuracy, %", "original", "changed", "p", "no worse") if paired else ("accuracy, %",)
    table = measurements("answers", columns)
    for name, *cells in rows:
        table.add_row(name, *cells[: len(columns)])
    return table


def divergence(found: Quality | ChainResults) -> str:
    """Return the mean, half its interval, and bars by position: "0.0604 ± 0.0055 █▅▆▆▅▄▄▅"."""
    if found.kl is None:
        return ""
    low, high = found.kl_interval or (None, None)
    reach = "" if low is None or high is None else f" [dim]± {(high - low) / 2:.4f}[/]"
    return f"{found.kl:.4f}{reach} {_by_position(found.kl_by_position or [])}"


def _accuracy(found: Answers) -> str:
    """Return the accuracy with its interval in percent: "85.1 [83.0, 87.0]"."""
    low, high = found.interval
    return rf"{100 * found.accuracy:.1f} [dim]\[{100 * low:.1f}, {100 * high:.1f}][/]"


def _with_error(name: str, metric: Metric) -> str:
    """Return a task's metric with its error: accuracies in percent, others as they are."""
    scale, digits = (100, 1) if name.startswith(("acc", "exact_match")) else (1, 3)
    value = f"{scale * metric.value:.{digits}f}"
    return value if metric.stderr is None else f"{value} [dim]± {scale * metric.stderr:.{digits}f}[/]"


def _by_position(parts: Sequence[Part]) -> str:
    """Return a bar for each part, from 0 to the highest."""
    values = [part["kl"] for part in parts]
    highest = max(values, default=0.0) or 1.0
    return "".join(BARS[max(0, min(7, round(7 * value / highest)))] for value in values)
