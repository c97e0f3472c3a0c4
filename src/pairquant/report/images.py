"""Figures as SVG and PNG files. Plotly draws in a browser: Kaleido drives an installed Chrome or Chromium."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..support.errors import ConfigError, ResourceError

WIDTH, WIDE = 760, 1180
#: Pixels from a figure's inside to the legend below: ticks, their labels, the axis' title.
LEGEND = 62
#: PNG pixels per pixel of the figure.
PNG_SCALE = 2


def require_browser() -> None:
    """Raise `ConfigError` without Kaleido, or without a browser that it can drive."""
    try:
        import kaleido  # noqa: F401
        from choreographer.browsers.chromium import Chromium
    except ImportError as error:
        raise ConfigError("figures as files need the package kaleido: pip install 'pairquant[report]'") from error
    if not Chromium.find_browser(skip_local=False):
        raise ConfigError(
            "figures as files need Chrome or Chromium, and none was found: install it (apt-get install chromium), "
            "or set BROWSER_PATH to one"
        )


def write_images(plots: Mapping[str, Any], directory: Path, template: dict[str, Any]) -> None:
    """Write `<key>.svg` and `<key>.png` of each plot, on white, into `directory`, which is made if it is missing.

    plots: key → `figures.Plot`; template: Plotly's. Raises `ResourceError` if the browser fails.
    """
    import kaleido

    directory.mkdir(exist_ok=True)
    jobs = []
    for key, plot in plots.items():
        figure = plot.to_dict()
        figure["layout"] |= {"template": template, "paper_bgcolor": "white", "title": {"text": plot.title, "x": 0.01}}
        figure["layout"]["margin"] = {"t": 48}
        inside = figure["layout"]["height"] - LEGEND
        figure["layout"]["legend"] = {"y": -LEGEND / inside, "yanchor": "top"}  # clear of the title, however many names
        options = {"width": WIDE if plot.wide else WIDTH, "height": figure["layout"]["height"] + 40}
        for kind, scale in (("svg", 1), ("png", PNG_SCALE)):
            path = directory / f"{key}.{kind}"
            jobs.append({"fig": figure, "path": path, "opts": {**options, "format": kind, "scale": scale}})
    # Without MathJax, which Kaleido would fetch from the network.
    failures = kaleido.write_fig_from_object_sync(jobs, kopts={"mathjax": False})
    if failures:
        raise ResourceError(f"drawing into {str(directory)!r} failed: {failures[0]}. Is the browser in order?")
