"""The report's figures, made by Plotly from facts. Colours that depend on the background come from `template`."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from plotly import graph_objects as go
from plotly.colors import sample_colorscale
from plotly.offline import get_plotlyjs

from .facts import CheckpointFacts, CloseUp, Evaluation, Histogram, LinearFacts
from .log import BlockRecord

BEFORE, AFTER = "#8d99ae", "#d1495b"
#: Told apart with impaired colour vision too, and on light and dark grounds.
COLORS = ("#d1495b", "#3a86c8", "#e0a030", "#2a9d7c", "#9b6fc4", "#8d99ae", "#c77d4f", "#5bb8c4")
#: Labels at 1, 2 and 5 of each decade.
LOGARITHMIC = {"type": "log", "dtick": "D2", "tickformat": "~g"}
BLOCKS = {"type": "category", "nticks": 12, "tickangle": 0}
#: First and last block.
DEPTH = [BEFORE, AFTER]
SCALES = {"light": ("#f6f1ee", "#e9b9b1", "#d1495b", "#6e2430"), "dark": ("#232a35", "#6e2430", "#d1495b", "#ffd9cf")}
INKS = {"light": ("#2b3038", "#dfe2e8"), "dark": ("#d6dae2", "#363d49")}


@dataclass(frozen=True)
class Plot:
    """A figure with its place in the page. key: file name and anchor; title, caption: plain text."""

    key: str
    title: str
    caption: str
    figure: go.Figure

    def to_dict(self) -> dict[str, Any]:
        """For plotly.js; arrays as base64."""
        return json.loads(self.figure.to_json())


def checkpoint_plots(facts: CheckpointFacts) -> list[Plot]:
    """Everything about one checkpoint that its files tell; what they do not tell is left out."""
    plots = []
    if any(linear.error is not None for linear in facts.linears):
        plots.append(_errors(facts.linears))
    plots += [_magnitude(facts.close_up), *_pair(facts.close_up)]
    if facts.angles:
        caption = "Rotations fitted to every pair of channels, in radians; channels left without a pair stay at zero."
        plots.append(_histogram("angles", "Rotation angles", caption, facts.angles, "angle (radians)"))
    caption = "What each input channel of a weight is multiplied by before it is rotated: 2 to the power of the axis."
    plots.append(_histogram("scales", "Channel scales", caption, facts.scales, "log₂ of the scale"))
    plots += _kl_by_position(facts.evaluations)
    if any(block.history for block in facts.blocks):
        plots.append(_training(facts.blocks))
    if facts.blocks:
        plots.append(_seconds(facts.blocks))
    if any(block.gpu_peak for block in facts.blocks):
        plots.append(_memory(facts.blocks))
    return plots


def comparison_plots(checkpoints: list[CheckpointFacts], evaluations: list[Evaluation]) -> list[Plot]:
    """Everything that sets checkpoints side by side."""
    plots = [
        _accuracy(evaluations, "kl", "Divergence against size", "KL (nats per token)"),
        _accuracy(evaluations, "perplexity", "Perplexity against size", "perplexity"),
    ]
    recorded = [c for c in checkpoints if any(linear.error is not None for linear in c.linears)]
    if len(recorded) > 1:
        plots.append(_errors_by_block(recorded))
    plots += _kl_by_position(evaluations)
    return [plot for plot in plots if plot.figure.data]


def template(theme: str) -> dict[str, Any]:
    """Plotly's template of inks and grounds, for "light" or "dark"."""
    ink, grid = INKS[theme]
    axis = {"gridcolor": grid, "linecolor": grid, "zerolinecolor": grid, "automargin": True, "title": {"standoff": 8}}
    scale = [[i / 3, color] for i, color in enumerate(SCALES[theme])]
    return {
        "layout": {
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": ink, "family": "system-ui, sans-serif", "size": 13},
            "colorway": COLORS,
            "coloraxis": {"colorscale": scale, "colorbar": {"outlinewidth": 0, "thickness": 12}},
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {"align": "left"},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "margin": {"l": 8, "r": 8, "b": 8},
        }
    }


def plotly_js() -> str:
    """The library that draws the figures: JavaScript, gzipped, as base64. 2.0 MB, where plain it would take 4.8."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _errors(linears: list[LinearFacts]) -> Plot:
    """Blocks across, kinds down."""
    blocks = list(dict.fromkeys(linear.block for linear in linears))
    kinds = list(dict.fromkeys(linear.kind for linear in linears))
    cells = {(linear.kind, linear.block): linear for linear in linears}
    errors = [[_error(cells.get((kind, block))) for block in blocks] for kind in kinds]
    trace = go.Heatmap(
        x=[block or "–" for block in blocks],
        y=[escape(kind) for kind in kinds],
        z=errors,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        hovertemplate="block %{x}, %{y}<br>%{z:.3f} %<extra></extra>",
    )
    figure = go.Figure(trace, _layout(80 + 30 * len(kinds), "block", legend=False))
    figure.update_layout(coloraxis_colorbar={"title": "%"})
    figure.update_xaxes(BLOCKS, showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    caption = "Relative error of each linear layer's output on the calibration text, in percent."
    return Plot("errors", "Error of every layer", caption, figure)


def _error(linear: LinearFacts | None) -> float | None:
    return None if linear is None or linear.error is None else 100 * linear.error


def _errors_by_block(checkpoints: list[CheckpointFacts]) -> Plot:
    figure = go.Figure(layout=_layout(340, "block", "mean error (%)"))
    for facts in checkpoints:
        means = mean_errors(facts.linears)
        figure.add_scatter(
            x=list(means), y=[100 * mean for mean in means.values()], name=escape(facts.name), mode="lines+markers"
        )
    figure.update_yaxes(LOGARITHMIC)
    figure.update_xaxes(BLOCKS)
    caption = "Relative output error on the calibration text, averaged over the linear layers of each block."
    return Plot("errors-by-block", "Error by block", caption, figure)


def mean_errors(linears: Iterable[LinearFacts]) -> dict[str, float]:
    """Block → mean of the errors recorded for its linears."""
    by_block: dict[str, list[float]] = {}
    for linear in linears:
        if linear.error is not None:
            by_block.setdefault(linear.block, []).append(linear.error)
    return {block: sum(errors) / len(errors) for block, errors in by_block.items()}


def _magnitude(close_up: CloseUp) -> Plot:
    figure = go.Figure(layout=_layout(340, "input channel", "mean |w|"))
    for name, color, values in (
        ("before", BEFORE, close_up.magnitude_before),
        ("after", AFTER, close_up.magnitude_after),
    ):
        figure.add_scatter(y=values.numpy(), name=name, mode="lines", line={"color": color, "width": 1})
    figure.update_yaxes(rangemode="tozero")
    caption = (
        f"{close_up.path}: magnitude of each input channel before and after scaling and rotation. {_basis(close_up)}"
    )
    return Plot("magnitude", "Weight magnitude", caption, figure)


def _pair(close_up: CloseUp) -> list[Plot]:
    """None without rotations."""
    if close_up.pair is None:
        return []
    i, j = close_up.pair
    figure = go.Figure(layout=_layout(420, f"weight of channel {i}", f"weight of channel {j}"))
    for name, color, points in (("before", BEFORE, close_up.points_before), ("after", AFTER, close_up.points_after)):
        x, y = (column.contiguous().numpy() for column in points.T)
        figure.add_scatter(x=x, y=y, name=name, mode="markers", marker={"color": color, "size": 4, "opacity": 0.6})
    figure.update_yaxes(scaleanchor="x")
    caption = (
        f"{close_up.path}: of all pairs of channels that are turned together, the two of the most different magnitude, "
        f"before and after; a point per output row. {_basis(close_up)}"
    )
    return [Plot("pair", "A pair of channels", caption, figure)]


def _basis(close_up: CloseUp) -> str:
    return "The original's weight." if close_up.exact else "The decoded weight: the original is not on this machine."


def _histogram(key: str, title: str, caption: str, histogram: Histogram, axis: str) -> Plot:
    figure = go.Figure(layout=_layout(320, axis, "share (%)"))
    for kind, shares in histogram.shares.items():
        figure.add_scatter(
            x=histogram.centers.numpy(),
            y=(100 * shares).numpy(),
            name=escape(kind),
            mode="lines",
            line={"shape": "hvh", "width": 1.5},
        )
    return Plot(key, title, caption, figure)


def _training(blocks: list[BlockRecord]) -> Plot:
    """A line per block and series; the stages follow each other."""
    figure = go.Figure(layout=_layout(380, "epoch", "loss"))
    trained = [block for block in blocks if block.history]
    colors = sample_colorscale(DEPTH, [place / max(1, len(trained) - 1) for place in range(len(trained))])
    for series, dash in (("validation", "solid"), ("loss", "dot")):
        for block, color in zip(trained, colors, strict=True):
            figure.add_scatter(
                x=_epochs(block),
                y=[getattr(epoch, series) for epoch in block.history],
                name="validation" if series == "validation" else "training",
                mode="lines",
                line={"color": color, "dash": dash, "width": 1.5},
                legendgroup=series,
                showlegend=block is trained[0],
                visible=True if series == "validation" else "legendonly",
                hovertemplate=f"block {block.index}, epoch %{{x}}<br>%{{y:.4g}}<extra></extra>",
            )
    figure.update_yaxes(LOGARITHMIC)
    caption = (
        "Loss of each block's training, from the first block (grey) to the last (red); epoch 0 is before training."
    )
    return Plot("training", "Block-wise training", caption, figure)


def _epochs(block: BlockRecord) -> list[int]:
    """Epochs counted through all stages, each of which starts at its own epoch 0: the end of the one before."""
    counted: list[int] = []
    done = 0
    for place, epoch in enumerate(block.history):
        if place and epoch.epoch == 0:
            done = counted[-1]
        counted.append(done + epoch.epoch)
    return counted


def _seconds(blocks: list[BlockRecord]) -> Plot:
    figure = go.Figure(layout=_layout(280, "block", "seconds", legend=False))
    figure.add_bar(x=[b.index for b in blocks], y=[round(b.seconds, 2) for b in blocks], marker_color=AFTER)
    figure.update_xaxes(BLOCKS)
    return Plot("seconds", "Time", "Seconds that each block took.", figure)


def _memory(blocks: list[BlockRecord]) -> Plot:
    figure = go.Figure(layout=_layout(280, "block", "GB", legend=False))
    figure.add_scatter(x=[b.index for b in blocks], y=[b.gpu_peak / 1e9 for b in blocks], line={"color": AFTER})
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(BLOCKS)
    return Plot("memory", "GPU memory", "Most GPU memory allocated until each block was done.", figure)


def _accuracy(evaluations: list[Evaluation], measure: str, title: str, axis: str) -> Plot:
    """A series per text; models without that measure, or whose size is not known, have no point."""
    figure = go.Figure(layout=_layout(360, "bits per weight", axis))
    for text in dict.fromkeys(text for evaluation in evaluations for text in evaluation.texts):
        points = [
            (e.texts[text][measure], e.bits_per_weight, e.name, e.kl_intervals.get(text) if measure == "kl" else None)
            for e in evaluations
            if text in e.texts and e.bits_per_weight is not None and e.texts[text].get(measure) is not None
        ]
        if points:
            values, bits, names, intervals = zip(*sorted(points), strict=True)
            figure.add_scatter(
                x=bits,
                y=values,
                text=[escape(name) for name in names],
                name=escape(text),
                mode="markers+text",
                textposition=_beside(bits),
                error_y=_error_bars(values, intervals),
                cliponaxis=False,
                marker={"size": 9},
                hovertemplate="%{text}<br>%{x:.2f} bits per weight<br>%{y:.4g}<extra></extra>",
            )
    figure.update_layout(showlegend=True)  # the text is named, also when there is but one
    figure.update_xaxes(range=_with_room([x for trace in figure.data for x in trace.x]))
    figure.update_yaxes(range=_with_room([y for trace in figure.data for y in trace.y]))
    caption = "Bits per weight count scales and transforms. Lower and further left is better."
    if any(trace.error_y.visible for trace in figure.data):
        caption += " Bars: 95\u00a0% intervals."
    return Plot(f"{measure}-by-bits", title, caption, figure)


def _error_bars(values: Sequence[float], intervals: Sequence[tuple[float, float] | None]) -> dict[str, Any]:
    """From each value to the ends of its interval, none where there is none."""
    ends = [interval or (value, value) for value, interval in zip(values, intervals, strict=True)]
    above = [high - value for value, (_, high) in zip(values, ends, strict=True)]
    below = [value - low for value, (low, _) in zip(values, ends, strict=True)]
    return {"array": above, "arrayminus": below, "visible": any(intervals)}


def _kl_by_position(evaluations: list[Evaluation]) -> list[Plot]:
    """A series per text, and per model if there are several; nothing if it was not measured."""
    figure = go.Figure(layout=_layout(340, "position (tokens)", "KL (nats per token)"))
    several = len({evaluation.name for evaluation in evaluations}) > 1
    for evaluation in evaluations:
        for text, places in evaluation.kl_by_position.items():
            positions, kls = zip(*places, strict=True)
            name = escape(f"{evaluation.name}, {text}" if several else text)
            figure.add_scatter(x=positions, y=kls, name=name, mode="lines+markers", showlegend=True)
    figure.update_yaxes(rangemode="tozero")
    caption = "Divergence from the original by the place of a token in its text: whether errors add up as texts go on."
    return [Plot("kl-by-position", "Divergence by position", caption, figure)] if figure.data else []


def _beside(bits: Sequence[float]) -> list[str]:
    """Where names stand, of points in ascending order of height: above, but below the lowest of about as many bits."""
    places, seen = [], set()
    for value in bits:
        places.append("top center" if round(value) in seen else "bottom center")
        seen.add(round(value))
    return places


def _with_room(values: list[float]) -> list[float] | None:
    """A range in which names beside the outermost points are not cut off."""
    if not values:
        return None
    room = 0.18 * (max(values) - min(values)) or 0.18 * abs(max(values)) or 1
    return [min(values) - room, max(values) + room]


def _layout(height: int, x: str, y: str = "", legend: bool = True) -> go.Layout:
    """With room for a legend above, or for the topmost tick's label alone."""
    return go.Layout(height=height, xaxis_title=x, yaxis_title=y or None, margin_t=36 if legend else 12)
