"""Models as points, accuracy up and something else across, with their names beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import log10
from typing import Any

from plotly import graph_objects as go

from .results import Interval
from .style import COLORS, LOGARITHMIC, Plot, far_apart, layout

#: What names are laid out for, in pixels: the inside of a figure and of one as wide as the page, a letter, a line.
INSIDE, WIDE, LETTER, LINE = (430, 240), (1040, 440), 7, 17
#: Of the whole figures.
HEIGHT, WIDE_HEIGHT = 360, 560
#: Where a name may stand, and which part of it then lies left of and above its point.
PLACES = {
    "top center": (0.5, 1.3), "bottom center": (0.5, -0.3), "middle right": (-0.08, 0.5), "middle left": (1.08, 0.5),
    "top right": (0, 1.2), "bottom right": (0, -0.2), "top left": (1, 1.2), "bottom left": (1, -0.2),
}  # fmt: skip
#: Left, top, right and bottom.
Box = tuple[float, float, float, float]
#: More names than this: the page's whole width, and only the first text's are shown until others are asked for.
CROWD = 12


@dataclass(frozen=True)
class Value:
    """A measurement of one model, with its 95 % interval."""

    value: float
    interval: Interval | None = None

    @property
    def ends(self) -> Interval:
        return self.interval or (self.value, self.value)


@dataclass(frozen=True)
class Axis:
    """Across: what accuracy is set against. key: in the figure's name; of: model → where it stands."""

    key: str
    title: str
    label: str
    of: Mapping[str, float]
    caption: str


@dataclass(frozen=True)
class Scale:
    """How values are laid out along an axis: evenly, or in decades where they are far apart. low, high: its ends, laid out."""

    logarithmic: bool
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], logarithmic: bool) -> Scale:
        """Make a scale with room for names beside the outermost points."""
        placed = [log10(value) if logarithmic else value for value in values] or [0.0, 1.0]
        room = 0.18 * (max(placed) - min(placed)) or 0.18 * abs(max(placed)) or 1
        return cls(logarithmic, min(placed) - room, max(placed) + room)

    def share(self, value: float) -> float:
        """Return where a value lies: Return where a value lies: 0 at the low end, 1 at the high one."""
        return ((log10(value) if self.logarithmic else value) - self.low) / (self.high - self.low)

    @property
    def ends(self) -> tuple[float, float]:
        """As values."""
        return (10**self.low, 10**self.high) if self.logarithmic else (self.low, self.high)


#: Text or set of problems → model → value.
Series = dict[str, dict[str, Value]]


def scatter(key: str, title: str, label: str, series: Series, axis: Axis, lines: set[str]) -> Plot:
    """Return a point for each model of which both are known, in a colour for each series; those of `lines` as lines across."""
    known = {name: {m: v for m, v in values.items() if m in axis.of} for name, values in series.items()}
    known = {name: values for name, values in known.items() if values.keys() - lines}
    known = dict(sorted(known.items(), key=lambda item: -len(item[1])))  # the first is the one shown in a crowd
    hidden = list(known)[1:] if sum(map(len, known.values())) > CROWD else []
    crowded = max(map(len, known.values()), default=0) > CROWD
    stands = [axis.of[m] for values in known.values() for m in values.keys() - lines]
    across = Scale.of(stands, far_apart(stands))
    decades = far_apart(_ends(known.values()))
    figure = go.Figure(layout=layout(WIDE_HEIGHT if crowded else HEIGHT, axis.label, label))
    shown = _ends(values for name, values in known.items() if name not in hidden)
    occupied: list[Box] = []
    for place, (name, values) in enumerate(known.items()):
        style = {"legendgroup": name, "name": escape(name), "visible": "legendonly" if name in hidden else True}
        color = COLORS[place % len(COLORS)]
        points = sorted(
            ((axis.of[m], v, m) for m, v in values.items() if m not in lines), key=lambda p: (p[1].value, p[0])
        )
        up = Scale.of(_ends([values]) if name in hidden else shown, decades)
        spots = [(across.share(x), up.share(v.value), m) for x, v, m in points]
        names = beside(spots, WIDE if crowded else INSIDE, [] if name in hidden else occupied)
        _add_points(figure, points, names, axis.label, color, style)
        for model in sorted(lines & values.keys()):
            _add_line(figure, model, values[model].value, across, color, style)
    figure.update_layout(showlegend=True)  # the text is named, also when there is but one
    figure.update_xaxes({"range": [across.low, across.high], **(LOGARITHMIC if across.logarithmic else {})})
    if decades:  # ends where what is shown does
        figure.update_yaxes(LOGARITHMIC | ({"dtick": "D1"} if max(shown) < 10 * min(shown) else {}))
    caption = f"{axis.caption} {'Higher' if key == 'answers' else 'Lower'} is better."
    if any(trace.error_y.visible for trace in figure.data):
        caption += " Bars: 95 % intervals."
    if crowded:
        caption += " A point tells its name when it is pointed at or tapped."
    if hidden:
        caption += " Click a name above the figure to show or hide it."
    return Plot(f"{key}-by-{axis.key}", f"{title} against {axis.title}", caption, figure, wide=crowded)


def _ends(series: Iterable[Mapping[str, Value]]) -> list[float]:
    """Return the ends of all intervals."""
    return [end for values in series for value in values.values() for end in value.ends]


def _add_points(
    figure: go.Figure,
    points: Sequence[tuple[float, Value, str]],
    places: Sequence[str],
    label: str,
    color: str,
    style: Mapping[str, Any],
) -> None:
    figure.add_scatter(
        x=[x for x, _, _ in points],
        y=[v.value for _, v, _ in points],
        text=[escape(model) for _, _, model in points],
        textposition=places,
        mode="markers+text",
        error_y=error_bars([v for _, v, _ in points]),
        cliponaxis=False,
        marker={"size": 9, "color": color},
        hovertemplate=f"%{{text}}<br>%{{x:.4~g}} {label}<br>%{{y:.4g}}<extra></extra>",
        **style,
    )


def _add_line(figure: go.Figure, model: str, value: float, across: Scale, color: str, style: Mapping[str, Any]) -> None:
    """Draw the original's value as a line from side to side."""
    figure.add_scatter(
        x=across.ends,
        y=[value, value],
        text=["", escape(model)],
        textposition="top left",
        mode="lines+text",
        line={"color": color, "dash": "dot", "width": 1.5},
        hovertemplate=f"{escape(model)}<br>%{{y:.4g}}<extra></extra>",
        **{**style, "showlegend": False},
    )


def error_bars(values: Sequence[Value]) -> dict[str, Any]:
    """Return bars from each value to the ends of its interval; none where there is no interval."""
    above = [v.ends[1] - v.value for v in values]
    below = [v.value - v.ends[0] for v in values]
    return {
        "array": above, "arrayminus": below, "visible": any(v.interval for v in values), "thickness": 1, "width": 3,
    }  # fmt: skip


def beside(
    points: Sequence[tuple[float, float, str]], inside: tuple[int, int], occupied: list[Box] | None = None
) -> list[str]:
    """Return where the name of each point stands: where it covers least of points, earlier names and edges.

    points: shares of the figure's inside (width and height in pixels) across and up, and a name; occupied: by earlier
    series, to which these are added.
    """
    taken = [] if occupied is None else occupied
    spots = [(x * inside[0], (1 - y) * inside[1]) for x, y, _ in points]
    taken += [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    beyond = [(-1000.0, -1000.0, 0.0, 2000.0), (float(inside[0]), -1000.0, 3000.0, 2000.0)]
    places = []
    for (x, y), (_, _, name) in zip(spots, points, strict=True):
        boxes = {place: _box(x, y, len(name), *part) for place, part in PLACES.items()}
        chosen = min(boxes, key=lambda place: sum(_overlap(boxes[place], other) for other in [*taken, *beyond]))
        taken.append(boxes[chosen])
        places.append(chosen)
    return places


def _box(x: float, y: float, letters: int, left: float, above: float) -> Box:
    """Return the box that a name takes."""
    width = LETTER * letters
    return x - left * width, y - above * LINE, x + (1 - left) * width, y + (1 - above) * LINE


def _overlap(a: Box, b: Box) -> float:
    """Return the common area."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
