"""The figures of what was measured: accuracy against size and speed, along chains of thought, answers, speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from plotly import graph_objects as go

from ..evaluation.results import ChainResults
from ..evaluation.statistics import Interval
from .results import CHAINS, Evaluation, Measured, Speed
from .scatter import Axis, Series, Value, error_bars, scatter
from .style import LOGARITHMIC, Plot, Stroke, far_apart, layout, strokes_of

#: More lines than this in one figure take the page's whole width.
MANY = 6


def against_size_and_speed(measured: Measured) -> list[Plot]:
    """Return divergence, perplexity and answers over bits per weight, and over the time to quantize and decoding speed as far as
    they were measured. Over bits, the originals are lines.
    """
    references = measured.references
    kl, perplexity, answers = _kl(measured), _perplexity(measured), _answers(measured)
    bits = {e.name: e.bits_per_weight for e in measured.evaluations if e.bits_per_weight is not None}
    size = Axis(
        "bits", "size", "bits per weight", bits, "Bits per weight count scales and transforms; further left is smaller."
    )
    plots = [
        scatter("kl", "Divergence", "KL (nats per token)", kl, size, references),
        scatter("perplexity", "Perplexity", "perplexity", perplexity, size, references),
        scatter("answers", "Answers", "accuracy (%)", answers, size, references),
        *(scatter("kl", "Divergence", "KL (nats per token)", kl, axis, references) for axis in _time_axes(measured)),
    ]
    for axis in _speed_axes(measured.speeds):
        originals = {name: Value(0.0) for name in references}
        from_original = {text: originals | values for text, values in kl.items()}
        plots += [
            scatter("kl", "Divergence", "KL (nats per token)", from_original, axis, set()),
            scatter("answers", "Answers", "accuracy (%)", answers, axis, set()),
        ]
    return [plot for plot in plots if plot.figure.data]


def measured_plots(measured: Measured, strokes: Mapping[str, Stroke]) -> list[Plot]:
    """Return what has no other axis: along positions and chains, answers one by one, speed. strokes: of each model."""
    plots = [
        *_kl_by_position(measured.evaluations, strokes),
        _departures(measured.evaluations, strokes),
        _answer_bars(measured, strokes),
        *_speeds(measured.speeds, strokes),
    ]
    return [plot for plot in plots if plot.figure.data]


def _kl(measured: Measured) -> Series:
    """Return KL of texts, and along chains of thought."""
    series = _of_texts(measured, "kl")
    for each in measured.evaluations:
        if each.chains:
            series.setdefault(CHAINS, {})[each.name] = Value(each.chains.kl, each.chains.kl_interval)
    return series


def _perplexity(measured: Measured) -> Series:
    return _of_texts(measured, "perplexity")


def _of_texts(measured: Measured, measure: str) -> Series:
    series: Series = {}
    for each in measured.evaluations:
        for text, quality in each.texts.items():
            if (value := getattr(quality, measure)) is not None:
                interval = quality.kl_interval if measure == "kl" else None
                series.setdefault(text, {})[each.name] = Value(value, interval)
    return series


def _answers(measured: Measured) -> Series:
    """Return accuracies in percent, the originals' among them."""
    series: Series = {}
    for each in measured.evaluations:
        for accuracy in each.accuracies:
            values = series.setdefault(accuracy.name, {})
            values[each.name] = _percent(accuracy.value, accuracy.interval)
            if accuracy.original is not None and each.reference:
                values.setdefault(each.reference, _percent(accuracy.original, accuracy.original_interval))
    return series


def _percent(share: float, interval: Interval | None) -> Value:
    return Value(100 * share, (100 * interval[0], 100 * interval[1]) if interval else None)


def _time_axes(measured: Measured) -> list[Axis]:
    seconds = {e.name: e.quantized_in_s for e in measured.evaluations if e.quantized_in_s}
    caption = "Seconds that quantizing took; further left is faster."
    return [Axis("time", "time to quantize", "time to quantize (s)", seconds, caption)] if len(seconds) > 1 else []


def _speed_axes(speeds: Sequence[Speed]) -> list[Axis]:
    """Return one for each setting in which several models were measured, at the fewest sequences at once."""
    axes = []
    for place, (setting, each) in enumerate(_by_setting(speeds).items()):
        batch = min(row.batch for speed in each for row in speed.rows)
        decoding = {s.name: row.decode_tokens_per_s for s in each for row in s.rows if row.batch == batch}
        if len(decoding) > 1:
            caption = f"Decoding at batch {batch}, {setting}; further right is faster."
            key = "speed" if place == 0 else f"speed-{place + 1}"
            axes.append(Axis(key, "speed", "decoding (tokens/s)", decoding, caption))
    return axes


def _by_setting(speeds: Sequence[Speed]) -> dict[str, list[Speed]]:
    settings: dict[str, list[Speed]] = {}
    for speed in speeds:
        settings.setdefault(speed.setting, []).append(speed)
    return settings


def _kl_by_position(evaluations: Sequence[Evaluation], strokes: Mapping[str, Stroke]) -> list[Plot]:
    """Draw one model with a line for each text; several models with a figure for each text."""
    caption = "Divergence from the original by the place of a token in its text: whether errors add up as texts go on."
    lines = [(e.name, text, places) for e in evaluations for text, places in e.kl_by_position.items()]
    if len({name for name, _, _ in lines}) <= 1:
        of_texts = strokes_of(text for _, text, _ in lines)
        named = [(text, places) for _, text, places in lines]
        figure = _lines_by_position(named, of_texts)
        return [Plot("kl-by-position", "Divergence by position", caption, figure, _wide(named))]
    plots = []
    for number, text in enumerate(dict.fromkeys(text for _, text, _ in lines), 1):
        named = [(name, places) for name, other, places in lines if other == text]
        key = "kl-by-position" if number == 1 else f"kl-by-position-{number}"
        figure = _lines_by_position(named, strokes)
        plots.append(Plot(key, f"Divergence by position, {text}", caption, figure, _wide(named)))
    return plots


def _lines_by_position(
    named: Sequence[tuple[str, Sequence[tuple[float, float]]]], strokes: Mapping[str, Stroke]
) -> go.Figure:
    figure = go.Figure(layout=layout(_height(300, len(named)), "position (tokens)", "KL (nats per token)"))
    for name, places in named:
        positions, kls = zip(*places, strict=True)
        figure.add_scatter(
            x=positions, y=kls, name=escape(name), mode="lines+markers", showlegend=True, line=strokes[name].line
        )
    far = far_apart([kl for _, places in named for _, kl in places])
    figure.update_yaxes(LOGARITHMIC if far else {"rangemode": "tozero"})
    return figure


def _height(inside: int, names: int) -> int:
    """Return the height with room for so many names above; on a phone there are two in a row."""
    return inside + 10 * names


def _wide(lines: Sequence[Any]) -> bool:
    return len(lines) > MANY


def _departures(evaluations: Sequence[Evaluation], strokes: Mapping[str, Stroke]) -> Plot:
    """Return the share of greedy chains that are still the original's, token by token, up to where the last one departs."""
    followed = [(e.name, _still_together(e.chains)) for e in evaluations if e.chains]
    figure = go.Figure(layout=layout(_height(300, len(followed)), "token", "still the original's (%)"))
    for name, (tokens, shares) in followed:
        line = {"shape": "hv", **strokes[name].line}
        figure.add_scatter(x=tokens, y=shares, name=escape(name), mode="lines", line=line, showlegend=True)
    if left := [tokens[-2] for _, (tokens, _) in followed if len(tokens) > 2]:
        figure.update_xaxes(range=[0, 1.05 * max(1, *left)])
    figure.update_yaxes(range=[0, 103])
    caption = (
        "The original's greedy answers: how many the model would decode alike up to each token. Later is better; a line "
        "that ends above zero is the share that never departs."
    )
    return Plot("departures", "Where decoding departs", caption, figure, _wide(followed))


def _still_together(chains: ChainResults) -> tuple[list[int], list[float]]:
    """Return tokens, and the percentage of chains that have not departed there."""
    left = sorted(place for place in chains.departures if place is not None)
    count = len(chains.departures)
    tokens = [0, *left, chains.plan.tokens]
    return tokens, [100.0, *(100 * (count - gone) / count for gone in range(1, len(left) + 1)), 100 * (count - len(left)) / count]  # fmt: skip


def _answer_bars(measured: Measured, strokes: Mapping[str, Stroke]) -> Plot:
    """Sets of problems down, a bar for each model."""
    series = _answers(measured)
    references = measured.references
    models = sorted({m for values in series.values() for m in values}, key=lambda m: (m not in references, m))
    figure = go.Figure(layout=layout(_height(110, len(models)) + 16 * len(models) * len(series), "accuracy (%)"))
    for model in models:
        values = {name: each[model] for name, each in series.items() if model in each}
        figure.add_bar(
            y=[escape(name) for name in values],
            x=[v.value for v in values.values()],
            error_x=error_bars(list(values.values())),
            name=escape(model),
            orientation="h",
            marker=strokes[model].bar,
            hovertemplate="%{y}: %{x:.1f} %<extra></extra>",
        )
    figure.update_layout(barmode="group", showlegend=True, bargap=0.25)
    figure.update_yaxes(autorange="reversed", ticksuffix=" ")
    figure.update_xaxes(rangemode="tozero")
    caption = (
        "Problems answered and tasks, with 95\u00a0% intervals. Whether a difference means anything is in the table."
    )
    return Plot("answers", "Answers", caption, figure, _wide(models))


def _speeds(speeds: Sequence[Speed], strokes: Mapping[str, Stroke]) -> list[Plot]:
    """Return a figure for each setting: numbers of sequences across, a bar for each model."""
    plots = []
    for place, (setting, each) in enumerate(_by_setting(speeds).items()):
        figure = go.Figure(layout=layout(_height(280, len(each)), "sequences at once", "tokens/s"))
        for speed in each:
            figure.add_bar(
                x=[str(row.batch) for row in speed.rows],
                y=[row.decode_tokens_per_s for row in speed.rows],
                name=escape(speed.name),
                marker=strokes[speed.name].bar,
                hovertemplate="%{x} at once: %{y:.1f} tokens/s<extra></extra>",
            )
        figure.update_layout(barmode="group", showlegend=True)
        figure.update_xaxes(type="category")
        key = "speed" if place == 0 else f"speed-{place + 1}"
        plots.append(Plot(key, "Decoding speed", f"Tokens per second over all sequences. {setting}.", figure))
    return plots
