"""What all figures share: the type, colours, and the library that draws them. Colours that depend on the background come
from `template`."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from plotly import graph_objects as go
from plotly.offline import get_plotlyjs

BEFORE, AFTER = "#8d99ae", "#d1495b"
#: Told apart with impaired colour vision too, and on light and dark grounds.
COLORS = (
    "#d1495b", "#3a86c8", "#e0a030", "#2a9d7c", "#9b6fc4", "#8d99ae", "#c77d4f", "#5bb8c4", "#7a8f2a", "#d987b4",
)  # fmt: skip
#: Labels at 1, 2 and 5 of each decade.
LOGARITHMIC = {"type": "log", "dtick": "D2", "tickformat": "~g"}
#: Values whose largest is so many times the smallest are laid out in decades.
FAR = 8
SCALES = {"light": ("#f6f1ee", "#e9b9b1", "#d1495b", "#6e2430"), "dark": ("#232a35", "#6e2430", "#d1495b", "#ffd9cf")}
INKS = {"light": ("#2b3038", "#dfe2e8"), "dark": ("#d6dae2", "#363d49")}


@dataclass(frozen=True)
class Stroke:
    """How one model, or one text, is drawn in every figure. dash: of lines; pattern: of bars, Plotly's names."""

    color: str
    dash: str
    pattern: str

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.color, "dash": self.dash}

    @property
    def bar(self) -> dict[str, Any]:
        return {"color": self.color, "pattern": {"shape": self.pattern}}


def strokes_of(names: Iterable[str], originals: Iterable[str] = ()) -> dict[str, Stroke]:
    """Return a stroke for each name, grey for originals; once the colours have been used up they come again, dashed."""
    grey, colors = set(originals), [color for color in COLORS if color != BEFORE]
    drawn = {name: Stroke(BEFORE, "solid", "") for name in grey}
    for place, name in enumerate(dict.fromkeys(name for name in names if name not in grey)):
        rounds, color = divmod(place, len(colors))
        drawn[name] = Stroke(colors[color], ("solid", "dash", "dot")[rounds % 3], ("", "/", "x")[rounds % 3])
    return drawn


@dataclass(frozen=True)
class Plot:
    """A figure with its place in the page. key: file name and anchor; title, caption: plain text; wide: the page's width."""

    key: str
    title: str
    caption: str
    figure: go.Figure
    wide: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the figure for plotly.js, with arrays as base64."""
        return json.loads(self.figure.to_json())


def far_apart(values: Sequence[float]) -> bool:
    """Return whether an axis for them should be logarithmic; never with zeros, or below."""
    return bool(values) and min(values) > 0 and max(values) > FAR * min(values)


def template(theme: str) -> dict[str, Any]:
    """Return Plotly's template of text and background colours, for "light" or "dark"."""
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
    """Return the library that draws the figures: JavaScript, gzipped, as base64. 2.0 MB, where plain it would take 4.8."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def layout(height: int, x: str, y: str = "", legend: bool = True) -> go.Layout:
    """Return a layout with room above for a legend, or for the topmost tick's label alone."""
    return go.Layout(height=height, xaxis_title=x, yaxis_title=y or None, margin_t=36 if legend else 12)
