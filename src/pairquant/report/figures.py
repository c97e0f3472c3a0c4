"""The figures of checkpoints, made by Plotly from facts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

from plotly import graph_objects as go
from plotly.colors import sample_colorscale

from .evidence import against_size_and_speed, measured_plots
from .facts import CheckpointFacts, CloseUp, Histogram, LinearFacts, ReportFacts
from .log import BlockRecord
from .style import AFTER, BEFORE, LOGARITHMIC, Plot, Stroke, layout, strokes_of

BLOCKS = {"type": "category", "nticks": 12, "tickangle": 0}
#: First and last block.
DEPTH = [BEFORE, AFTER]


def checkpoint_plots(facts: CheckpointFacts, strokes: Mapping[str, Stroke]) -> list[Plot]:
    """Return everything about one checkpoint that its files tell; what they do not tell is left out. strokes: of each model."""
    plots = []
    if any(linear.error is not None for linear in facts.linears):
        plots.append(_errors(facts.linears))
    plots += _forms(facts.linears)
    plots += [_magnitude(facts.close_up), *_pair(facts.close_up)]
    if facts.angles:
        caption = "Rotations fitted to every pair of channels, in radians; channels left without a pair stay at zero."
        plots.append(_histogram("angles", "Rotation angles", caption, facts.angles, "angle (radians)"))
    caption = "What each input channel of a weight is multiplied by before it is rotated: 2 to the power of the axis."
    plots.append(_histogram("scales", "Channel scales", caption, facts.scales, "log₂ of the scale"))
    plots += measured_plots(facts.measured, strokes)
    if any(block.history for block in facts.blocks):
        plots.append(_training(facts.blocks))
    if facts.blocks:
        plots.append(_seconds(facts.blocks))
    if any(block.gpu_peak for block in facts.blocks):
        plots.append(_memory(facts.blocks))
    return plots


def strokes(facts: ReportFacts) -> dict[str, Stroke]:
    """Return how each model is drawn, wherever it is: the originals in grey."""
    return strokes_of(facts.models, facts.measured.references)


def comparison_plots(facts: ReportFacts, strokes: Mapping[str, Stroke]) -> list[Plot]:
    """Return everything that sets models side by side."""
    plots = against_size_and_speed(facts.measured)
    recorded = [c for c in facts.checkpoints if any(linear.error is not None for linear in c.linears)]
    if len(recorded) > 1:
        plots.append(_errors_by_block(recorded, strokes))
    return plots + measured_plots(facts.measured, strokes)


def _errors(linears: list[LinearFacts]) -> Plot:
    """Return blocks across, kinds down."""
    figure = _map(linears, _error, "%{z:.3f} %")
    figure.update_layout(coloraxis_colorbar={"title": "%"})
    caption = "Relative error of each linear layer's output on the calibration text, in percent."
    return Plot("errors", "Error of every layer", caption, figure)


def _forms(linears: list[LinearFacts]) -> list[Plot]:
    """Return the bits of every layer, blocks across, kinds down; nothing if all layers are stored alike."""
    if len({linear.layout.spec for linear in linears}) < 2:
        return []
    figure = _map(linears, lambda linear: linear and linear.layout.bits, "%{z} bits<br>%{text}", texttemplate="%{z}")
    figure.update_traces(text=_cells(linears, lambda linear: str(linear.layout.spec) if linear else ""))
    figure.update_layout(coloraxis_showscale=False)
    caption = "Bits of each linear layer's codes; pointing at one shows its group size and rotations."
    return [Plot("forms", "Bits of every layer", caption, figure)]


def _map(linears: list[LinearFacts], value: Callable[[LinearFacts | None], Any], shown: str, **more: Any) -> go.Figure:
    """Return a heat map of a value of every layer, blocks across, kinds down. shown: the value, as Plotly writes it."""
    kinds = list(dict.fromkeys(linear.kind for linear in linears))
    trace = go.Heatmap(
        x=[block or "–" for block in dict.fromkeys(linear.block for linear in linears)],
        y=[escape(kind) for kind in kinds],
        z=_cells(linears, value),
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        hovertemplate=f"block %{{x}}, %{{y}}<br>{shown}<extra></extra>",
        **more,
    )
    figure = go.Figure(trace, layout(80 + 30 * len(kinds), "block", legend=False))
    figure.update_xaxes(BLOCKS, showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def _cells(linears: list[LinearFacts], value: Callable[[LinearFacts | None], Any]) -> list[list[Any]]:
    """Return a value of every layer, a row for each kind, a column for each block."""
    cells = {(linear.kind, linear.block): linear for linear in linears}
    kinds, blocks = (list(dict.fromkeys(getattr(linear, name) for linear in linears)) for name in ("kind", "block"))
    return [[value(cells.get((kind, block))) for block in blocks] for kind in kinds]


def _error(linear: LinearFacts | None) -> float | None:
    return None if linear is None or linear.error is None else 100 * linear.error


def _errors_by_block(checkpoints: list[CheckpointFacts], strokes: Mapping[str, Stroke]) -> Plot:
    figure = go.Figure(layout=layout(340, "block", "mean error (%)"))
    for facts in checkpoints:
        means = mean_errors(facts.linears)
        figure.add_scatter(
            x=list(means), y=[100 * mean for mean in means.values()], name=escape(facts.name), mode="lines+markers",
            line=strokes[facts.name].line,
        )  # fmt: skip
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
    figure = go.Figure(layout=layout(340, "input channel", "mean |w|"))
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
    figure = go.Figure(layout=layout(420, f"weight of channel {i}", f"weight of channel {j}"))
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
    figure = go.Figure(layout=layout(320, axis, "share (%)"))
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
    """Return a line per block and series; the stages follow each other."""
    figure = go.Figure(layout=layout(380, "epoch", "loss"))
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
    """Return epochs counted through all stages, each of which starts at its own epoch 0: the end of the one before."""
    counted: list[int] = []
    done = 0
    for place, epoch in enumerate(block.history):
        if place and epoch.epoch == 0:
            done = counted[-1]
        counted.append(done + epoch.epoch)
    return counted


def _seconds(blocks: list[BlockRecord]) -> Plot:
    figure = go.Figure(layout=layout(280, "block", "seconds", legend=False))
    figure.add_bar(x=[b.index for b in blocks], y=[round(b.seconds, 2) for b in blocks], marker_color=AFTER)
    figure.update_xaxes(BLOCKS)
    return Plot("seconds", "Time", "Seconds that each block took.", figure)


def _memory(blocks: list[BlockRecord]) -> Plot:
    figure = go.Figure(layout=layout(280, "block", "GB", legend=False))
    figure.add_scatter(x=[b.index for b in blocks], y=[b.gpu_peak / 1e9 for b in blocks], line={"color": AFTER})
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(BLOCKS)
    return Plot("memory", "GPU memory", "Most GPU memory allocated until each block was done.", figure)
