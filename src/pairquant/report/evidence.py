"""The figures of what was measured: accuracy against size and speed, along chains of thought, answers, speed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from plotly import graph_objects as go

from .results import Chains, Evaluation, Interval, Measured, Speed
from .style import BEFORE, COLORS, Plot, layout

#: What names beside points are laid out for, in pixels: the figure's inside, a letter, a line.
INSIDE, LETTER, LINE = (430, 240), 7, 17
#: Where a name may stand, and which part of it then lies left of and above its point.
PLACES = {
    "top center": (0.5, 1.3), "bottom center": (0.5, -0.3), "middle right": (-0.08, 0.5), "middle left": (1.08, 0.5),
    "top right": (0, 1.2), "bottom right": (0, -0.2), "top left": (1, 1.2), "bottom left": (1, -0.2),
}  # fmt: skip

#: More names than this beside points, and only the first text's are shown until others are asked for.
CROWD = 12


@dataclass(frozen=True)
class Value:
    """A measurement of one model, with its 95 % interval."""

    value: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Axis:
    """Across: what accuracy is set against. of: model → where it stands; better: which side."""

    key: str
    title: str
    label: str
    of: Mapping[str, float]
    caption: str


#: Text or set of problems → model → value.
Series = dict[str, dict[str, Value]]


def against_size_and_speed(measured: Measured, references: set[str]) -> list[Plot]:
    """Divergence, perplexity and answers over bits per weight, and over decoding speed as far as it was measured.

    references: the originals; over bits they are lines.
    """
    kl, perplexity, answers = _kl(measured), _perplexity(measured), _answers(measured)
    bits = {e.name: e.bits_per_weight for e in measured.evaluations if e.bits_per_weight is not None}
    size = Axis(
        "bits", "size", "bits per weight", bits, "Bits per weight count scales and transforms; further left is smaller."
    )
    plots = [
        _scatter("kl", "Divergence", "KL (nats per token)", kl, size, references),
        _scatter("perplexity", "Perplexity", "perplexity", perplexity, size, references),
        _scatter("answers", "Answers", "accuracy (%)", answers, size, references),
    ]
    for axis in _speed_axes(measured.speeds):
        originals = {name: Value(0.0) for name in references}
        from_original = {text: originals | values for text, values in kl.items()}
        plots += [
            _scatter("kl", "Divergence", "KL (nats per token)", from_original, axis, set()),
            _scatter("answers", "Answers", "accuracy (%)", answers, axis, set()),
        ]
    return [plot for plot in plots if plot.figure.data]


def measured_plots(measured: Measured) -> list[Plot]:
    """What has no other axis: along positions and chains, answers one by one, speed."""
    plots = [
        *_kl_by_position(measured.evaluations),
        _departures(measured.evaluations),
        _answer_bars(measured),
        *_speeds(measured.speeds),
    ]
    return [plot for plot in plots if plot.figure.data]


def _kl(measured: Measured) -> Series:
    return _of_texts(measured, "kl")


def _perplexity(measured: Measured) -> Series:
    return _of_texts(measured, "perplexity")


def _of_texts(measured: Measured, measure: str) -> Series:
    series: Series = {}
    for each in measured.evaluations:
        for text, row in each.texts.items():
            if row.get(measure) is not None:
                interval = each.kl_intervals.get(text) if measure == "kl" else None
                series.setdefault(text, {})[each.name] = Value(row[measure], interval)
    return series


def _answers(measured: Measured) -> Series:
    """In percent, the originals' among them."""
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


def _speed_axes(speeds: Sequence[Speed]) -> list[Axis]:
    """One for each setting in which several models were measured, at the fewest sequences at once."""
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


def _scatter(key: str, title: str, label: str, series: Series, axis: Axis, lines: set[str]) -> Plot:
    """A point for each model of which both are known, in a colour for each series; those of `lines` as lines across."""
    figure = go.Figure(layout=layout(360, axis.label, label))
    known = {name: {m: v for m, v in values.items() if m in axis.of} for name, values in series.items()}
    known = {name: values for name, values in known.items() if values.keys() - lines}
    across = _with_room([axis.of[m] for values in known.values() for m in values.keys() - lines])
    crowded = sum(map(len, known.values())) > CROWD
    for place, (name, values) in enumerate(known.items()):
        points = sorted(
            ((axis.of[m], v, m) for m, v in values.items() if m not in lines), key=lambda p: (p[1].value, p[0])
        )
        style = {
            "legendgroup": name, "name": escape(name), "visible": "legendonly" if crowded and place else True,
        }  # fmt: skip
        color = COLORS[place % len(COLORS)]
        _add_points(figure, points, across, axis.label, color, style)
        for model in sorted(lines & values.keys()):
            _add_line(figure, model, values[model].value, across, color, style)
    figure.update_layout(showlegend=True)  # the text is named, also when there is but one
    figure.update_xaxes(range=across)
    caption = f"{axis.caption} {'Higher' if key == 'answers' else 'Lower'} is better."
    if any(trace.error_y.visible for trace in figure.data):
        caption += " Bars: 95 % intervals."
    if crowded and len(known) > 1:
        caption += " Click a name above the figure to show or hide it."
    return Plot(f"{key}-by-{axis.key}", f"{title} against {axis.title}", caption, figure)


def _add_points(
    figure: go.Figure,
    points: Sequence[tuple[float, Value, str]],
    across: tuple[float, float],
    label: str,
    color: str,
    style: Mapping[str, Any],
) -> None:
    ends = [end for _, v, _ in points for end in v.interval or (v.value,)]
    figure.add_scatter(
        x=[x for x, _, _ in points],
        y=[v.value for _, v, _ in points],
        text=[escape(model) for _, _, model in points],
        textposition=_beside([(x, v.value, model) for x, v, model in points], across, _with_room(ends)),
        mode="markers+text",
        error_y=_error_bars([v for _, v, _ in points]),
        cliponaxis=False,
        marker={"size": 9, "color": color},
        hovertemplate=f"%{{text}}<br>%{{x:.4~g}} {label}<br>%{{y:.4g}}<extra></extra>",
        **style,
    )


def _add_line(
    figure: go.Figure, model: str, value: float, across: tuple[float, float], color: str, style: Mapping[str, Any]
) -> None:
    """The original's value, from side to side."""
    figure.add_scatter(
        x=across,
        y=[value, value],
        text=["", escape(model)],
        textposition="top left",
        mode="lines+text",
        line={"color": color, "dash": "dot", "width": 1.5},
        hovertemplate=f"{escape(model)}<br>%{{y:.4g}}<extra></extra>",
        **{**style, "showlegend": False},
    )


def _error_bars(values: Sequence[Value]) -> dict[str, Any]:
    """From each value to the ends of its interval, none where there is none."""
    ends = [v.interval or (v.value, v.value) for v in values]
    above = [high - v.value for v, (_, high) in zip(values, ends, strict=True)]
    below = [v.value - low for v, (low, _) in zip(values, ends, strict=True)]
    return {
        "array": above, "arrayminus": below, "visible": any(v.interval for v in values), "thickness": 1, "width": 3,
    }  # fmt: skip


def _beside(points: Sequence[tuple[float, float, str]], xs: tuple[float, float], ys: tuple[float, float]) -> list[str]:
    """Where the name of each point (x, y, name) stands: where it covers least of points, earlier names and edges."""
    scale_x, scale_y = INSIDE[0] / (xs[1] - xs[0]), INSIDE[1] / (ys[1] - ys[0])
    spots = [((x - xs[0]) * scale_x, (ys[1] - y) * scale_y) for x, y, _ in points]
    beyond = [(-1000.0, -1000.0, 0.0, 2000.0), (INSIDE[0], -1000.0, 2000.0, 2000.0)]
    taken = [*beyond, *((x - 5, y - 5, x + 5, y + 5) for x, y in spots)]
    places = []
    for (x, y), (_, _, name) in zip(spots, points, strict=True):
        boxes = {place: _box(x, y, len(name), *part) for place, part in PLACES.items()}
        chosen = min(boxes, key=lambda place: sum(_overlap(boxes[place], other) for other in taken))
        taken.append(boxes[chosen])
        places.append(chosen)
    return places


def _box(x: float, y: float, letters: int, left: float, above: float) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a name."""
    width = LETTER * letters
    return x - left * width, y - above * LINE, x + (1 - left) * width, y + (1 - above) * LINE


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The common area."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _with_room(values: Sequence[float]) -> tuple[float, float]:
    """A range in which names beside the outermost points are not cut off."""
    if not values:
        return 0.0, 1.0
    room = 0.18 * (max(values) - min(values)) or 0.18 * abs(max(values)) or 1
    return min(values) - room, max(values) + room


def _kl_by_position(evaluations: Sequence[Evaluation]) -> list[Plot]:
    """Of one model a series per text; of several a figure per text."""
    caption = "Divergence from the original by the place of a token in its text: whether errors add up as texts go on."
    lines = [(e.name, text, places) for e in evaluations for text, places in e.kl_by_position.items()]
    if len({name for name, _, _ in lines}) <= 1:
        named = [(text, places) for _, text, places in lines]
        return [Plot("kl-by-position", "Divergence by position", caption, _lines_by_position(named))]
    plots = []
    for number, text in enumerate(dict.fromkeys(text for _, text, _ in lines), 1):
        named = [(name, places) for name, other, places in lines if other == text]
        key = "kl-by-position" if number == 1 else f"kl-by-position-{number}"
        plots.append(Plot(key, f"Divergence by position, {text}", caption, _lines_by_position(named)))
    return plots


def _lines_by_position(named: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> go.Figure:
    figure = go.Figure(layout=layout(_height(300, len(named)), "position (tokens)", "KL (nats per token)"))
    for name, places in named:
        positions, kls = zip(*places, strict=True)
        figure.add_scatter(x=positions, y=kls, name=escape(name), mode="lines+markers", showlegend=True)
    figure.update_yaxes(rangemode="tozero")
    return figure


def _height(inside: int, names: int) -> int:
    """With room for so many names above; on a phone there are two in a row."""
    return inside + 10 * names


def _departures(evaluations: Sequence[Evaluation]) -> Plot:
    """The share of greedy chains that are still the original's, token by token."""
    figure = go.Figure(layout=layout(_height(300, len(evaluations)), "token", "still the original's (%)"))
    for evaluation in evaluations:
        if evaluation.chains:
            tokens, shares = _still_together(evaluation.chains)
            figure.add_scatter(
                x=tokens, y=shares, name=escape(evaluation.name), mode="lines", line={"shape": "hv"}, showlegend=True
            )
    figure.update_yaxes(range=[0, 103])
    caption = (
        "The original's greedy answers: how many the model would decode alike up to each token. Later is better; a line "
        "that ends above zero is the share that never departs."
    )
    return Plot("departures", "Where decoding departs", caption, figure)


def _still_together(chains: Chains) -> tuple[list[int], list[float]]:
    """Tokens, and the percentage of chains that have not departed there."""
    left = sorted(place for place in chains.departures if place is not None)
    count = len(chains.departures)
    tokens = [0, *left, chains.most_tokens]
    return tokens, [100.0, *(100 * (count - gone) / count for gone in range(1, len(left) + 1)), 100 * (count - len(left)) / count]  # fmt: skip


def _answer_bars(measured: Measured) -> Plot:
    """Sets of problems down, a bar for each model."""
    series = _answers(measured)
    references = {each.reference for each in measured.evaluations}
    models = sorted({m for values in series.values() for m in values}, key=lambda m: (m not in references, m))
    figure = go.Figure(layout=layout(_height(110, len(models)) + 16 * len(models) * len(series), "accuracy (%)"))
    colors = itertools.cycle(color for color in COLORS if color != BEFORE)
    for model in models:
        values = {name: each[model] for name, each in series.items() if model in each}
        error_bars = _error_bars(list(values.values()))
        figure.add_bar(
            y=[escape(name) for name in values],
            x=[v.value for v in values.values()],
            error_x=error_bars,
            name=escape(model),
            orientation="h",
            marker={"color": BEFORE if model in references else next(colors)},
            hovertemplate="%{y}: %{x:.1f} %<extra></extra>",
        )
    figure.update_layout(barmode="group", showlegend=True, bargap=0.25)
    figure.update_yaxes(autorange="reversed", ticksuffix=" ")
    figure.update_xaxes(rangemode="tozero")
    caption = (
        "Problems answered and tasks, with 95\u00a0% intervals. Whether a difference means anything is in the table."
    )
    return Plot("answers", "Answers", caption, figure)


def _speeds(speeds: Sequence[Speed]) -> list[Plot]:
    """A figure for each setting: numbers of sequences across, a bar for each model."""
    plots = []
    for place, (setting, each) in enumerate(_by_setting(speeds).items()):
        figure = go.Figure(layout=layout(_height(280, len(each)), "sequences at once", "tokens/s"))
        for speed in each:
            figure.add_bar(
                x=[str(row.batch) for row in speed.rows],
                y=[row.decode_tokens_per_s for row in speed.rows],
                name=escape(speed.name),
                hovertemplate="%{x} at once: %{y:.1f} tokens/s<extra></extra>",
            )
        figure.update_layout(barmode="group", showlegend=True)
        figure.update_xaxes(type="category")
        key = "speed" if place == 0 else f"speed-{place + 1}"
        plots.append(Plot(key, "Decoding speed", f"Tokens per second over all sequences. {setting}.", figure))
    return plots
