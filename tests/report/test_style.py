"""Colours that tell models apart, the two themes, and the library that draws."""

import base64
import gzip
import json

import pytest

pytest.importorskip("plotly", reason="the extra `report` is not installed")

import torch
from plotly import graph_objects as go

from pairquant.report.style import BEFORE, Plot, far_apart, layout, plotly_js, strokes_of, template


def luminance(color):
    """Relative luminance of #rrggbb, 0 to 1, as the WCAG defines it."""
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(share * channel for share, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_many_models_are_told_apart_by_colour_and_then_by_dash():
    strokes = strokes_of([f"model-{number}" for number in range(27)])
    assert len({(stroke.color, stroke.dash) for stroke in strokes.values()}) == 27
    assert len({(stroke.color, stroke.pattern) for stroke in strokes.values()}) == 27
    assert {stroke.dash for stroke in list(strokes.values())[:9]} == {"solid"}


def test_originals_are_grey_and_nothing_else_is():
    strokes = strokes_of(["a", "big", "b", *(f"model-{number}" for number in range(20))], ["big"])
    assert [name for name, stroke in strokes.items() if stroke.color == BEFORE] == ["big"]


def test_a_model_keeps_its_stroke_when_others_come_after_it_or_it_is_named_twice():
    assert strokes_of(["a", "b", "a", "c"])["c"] == strokes_of(["a", "b", "c", "d"])["c"]


def test_a_stroke_is_drawn_alike_as_a_line_and_as_a_bar():
    stroke = strokes_of([str(number) for number in range(12)])["11"]
    assert stroke.line == {"color": stroke.color, "dash": stroke.dash}
    assert stroke.bar["color"] == stroke.color
    go.Figure().add_scatter(x=[1], y=[1], line=stroke.line)
    go.Figure().add_bar(x=[1], y=[1], marker=stroke.bar)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 8.0], False),
        ([1.0, 8.1], True),
        ([-1.0, 100.0], False),
        ([0.0, 100.0], False),
        ([5.0], False),
        ([], False),
    ],
)
def test_values_are_far_apart_only_where_decades_can_show_them(values, expected):
    assert far_apart(values) is expected


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_theme_is_one_that_plotly_takes_and_leaves_the_ground_to_the_page(theme):
    given = template(theme)["layout"]
    figure = go.Figure(layout={"template": template(theme)})
    assert figure.layout.template.layout.font.color == given["font"]["color"]
    assert given["paper_bgcolor"] == given["plot_bgcolor"] == "rgba(0,0,0,0)"
    json.dumps(template(theme))


def test_ink_is_dark_on_light_and_light_on_dark():
    light, dark = (luminance(template(theme)["layout"]["font"]["color"]) for theme in ("light", "dark"))
    assert (1 + 0.05) / (light + 0.05) > 7, "text on white"
    assert (dark + 0.05) / 0.05 > 7, "text on black"


@pytest.mark.parametrize(("theme", "rising"), [("light", False), ("dark", True)])
def test_larger_errors_stand_out_more_from_the_ground(theme, rising):
    scale = template(theme)["layout"]["coloraxis"]["colorscale"]
    assert [place for place, _ in scale] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    shades = [luminance(color) for _, color in scale]
    assert shades == sorted(shades, reverse=not rising)


def test_a_plot_is_plain_json_with_arrays_in_base64():
    values = torch.tensor([0.5, 1.5]).numpy()
    found = Plot("key", "Title", "Caption.", go.Figure().add_scatter(y=values)).to_dict()
    stored = found["data"][0]["y"]
    assert stored["dtype"] == "f4"
    assert base64.b64decode(stored["bdata"]) == values.tobytes()
    json.dumps(found)


def test_a_figure_without_a_legend_needs_less_room_above():
    assert layout(300, "x", legend=False).margin.t < layout(300, "x").margin.t
    made = layout(300, "block", "loss")
    assert (made.height, made.xaxis.title.text, made.yaxis.title.text) == (300, "block", "loss")
    assert layout(300, "block").yaxis.title.text is None


def test_the_library_is_whole_and_the_same_every_time():
    packed = plotly_js()
    script = gzip.decompress(base64.b64decode(packed)).decode()
    assert "plotly.js v" in script[:200]
    assert len(packed) < len(script) / 2
    assert plotly_js() == packed
