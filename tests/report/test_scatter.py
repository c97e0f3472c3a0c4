"""Models as points: which are shown, where, and what the caption says of them."""

import pytest

pytest.importorskip("plotly", reason="the extra `report` is not installed")

from pairquant.report.scatter import CROWD, Axis, Scale, Value, beside, error_bars, scatter

BITS = {"big": 16.0, "a": 4.6, "b": 3.4}
AXIS = Axis("bits", "size", "bits per weight", BITS, "Divergence against size.")


def drawn(series, axis=AXIS, lines=(), key="kl"):
    return scatter(key, "Divergence", "KL", series, axis, set(lines))


def points(plot):
    """Series → model → (x, y), without lines."""
    return {
        trace.name: {name: (x, y) for name, x, y in zip(trace.text, trace.x, trace.y, strict=True)}
        for trace in plot.figure.data
        if "markers" in trace.mode
    }


def test_a_point_for_each_model_of_which_both_are_known():
    plot = drawn({"wiki": {"a": Value(0.1), "b": Value(0.3), "unmeasured": Value(9.0)}})
    assert points(plot) == {"wiki": {"a": (4.6, 0.1), "b": (3.4, 0.3)}}
    assert (plot.key, plot.title) == ("kl-by-bits", "Divergence against size")
    assert (plot.figure.layout.xaxis.title.text, plot.figure.layout.yaxis.title.text) == ("bits per weight", "KL")


def test_a_series_of_which_nothing_can_be_shown_is_left_out():
    assert drawn({"wiki": {"unmeasured": Value(9.0)}}).figure.data == ()
    assert drawn({"wiki": {"big": Value(9.0)}}, lines=["big"]).figure.data == ()


def test_each_series_has_a_colour_that_its_line_shares():
    series = {name: {"big": Value(10.0 + place), "a": Value(20.0), "b": Value(30.0)} for place, name in enumerate("xy")}
    plot = drawn(series, lines=["big"])
    colors = {}
    for trace in plot.figure.data:
        colors.setdefault(trace.name, set()).add(trace.marker.color if "markers" in trace.mode else trace.line.color)
    assert [len(found) for found in colors.values()] == [1, 1]
    assert colors["x"] != colors["y"]


def test_the_original_is_a_line_from_side_to_side_and_no_point():
    plot = drawn({"wiki": {"big": Value(10.0), "a": Value(20.0), "b": Value(30.0)}}, lines=["big"])
    assert "big" not in points(plot)["wiki"]
    (line,) = (trace for trace in plot.figure.data if "lines" in trace.mode)
    assert line.y == (10.0, 10.0)
    assert list(line.x) == pytest.approx(list(plot.figure.layout.xaxis.range))
    assert line.text[1] == "big"
    assert not line.showlegend


def test_every_point_lies_inside_the_axis():
    for bits in ({"a": 4.0, "b": 4.0}, {"a": 3.0, "b": 4.5}, {"a": 0.1, "b": 100.0}):
        axis = Axis("bits", "size", "bits", bits, "")
        plot = drawn({"wiki": {"a": Value(0.1), "b": Value(0.2)}}, axis)
        low, high = plot.figure.layout.xaxis.range
        logarithmic = plot.figure.layout.xaxis.type == "log"
        assert logarithmic == (bits["b"] == 100.0)
        low, high = (10**low, 10**high) if logarithmic else (low, high)
        assert all(low < x < high for x, _ in points(plot)["wiki"].values())


def test_values_far_apart_are_laid_out_in_decades_unless_one_is_zero():
    assert drawn({"wiki": {"a": Value(0.01), "b": Value(1.0)}}).figure.layout.yaxis.type == "log"
    assert drawn({"wiki": {"a": Value(0.0), "b": Value(1.0)}}).figure.layout.yaxis.type is None
    assert drawn({"wiki": {"a": Value(0.5), "b": Value(1.0)}}).figure.layout.yaxis.type is None


def test_intervals_are_bars_and_the_caption_says_of_what():
    plot = drawn({"wiki": {"a": Value(0.1, (0.05, 0.3)), "b": Value(0.3)}})
    (trace,) = plot.figure.data
    by_name = dict(zip(trace.text, zip(trace.error_y.arrayminus, trace.error_y.array, strict=True), strict=True))
    assert by_name["a"] == pytest.approx((0.05, 0.2))
    assert by_name["b"] == (0, 0)
    assert plot.caption == "Divergence against size. Lower is better. Bars: 95 % intervals."
    assert "Bars" not in drawn({"wiki": {"a": Value(0.1), "b": Value(0.3)}}).caption


def test_bars_are_hidden_where_no_interval_is_known():
    assert not error_bars([Value(1.0), Value(2.0)])["visible"]
    bars = error_bars([Value(1.0, (0.5, 3.0)), Value(2.0)])
    assert (bars["visible"], bars["array"], bars["arrayminus"]) == (True, [2.0, 0.0], [0.5, 0.0])


def test_of_answers_higher_is_better():
    assert "Higher is better." in drawn({"gsm8k": {"a": Value(50.0), "b": Value(40.0)}}, key="answers").caption


def test_names_are_text_and_no_markup():
    plot = drawn({"<b>wiki": {"<i>a": Value(0.1)}}, Axis("bits", "size", "bits", {"<i>a": 4.0}, ""))
    (trace,) = plot.figure.data
    assert (trace.name, trace.text) == ("&lt;b&gt;wiki", ("&lt;i&gt;a",))


def test_a_crowd_takes_the_whole_width_and_all_but_its_largest_series_wait_to_be_asked_for():
    models = {f"model-{number}": 3.0 + number / 10 for number in range(CROWD + 1)}
    axis = Axis("bits", "size", "bits", models, "")
    few = {"model-0": Value(0.1), "model-1": Value(0.2)}
    plot = drawn({"few": few, "many": {name: Value(0.1 + bits / 100) for name, bits in models.items()}}, axis)
    assert plot.wide
    assert {trace.name: trace.visible for trace in plot.figure.data} == {"many": True, "few": "legendonly"}
    assert "Click a name" in plot.caption
    alone = drawn({"few": few}, axis)
    assert not alone.wide
    assert "Click a name" not in alone.caption


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_scale_runs_from_its_low_end_to_its_high_one(logarithmic):
    scale = Scale.of([0.5, 2.0, 30.0], logarithmic)
    low, high = scale.ends
    assert low < 0.5 < 30.0 < high
    shares = [scale.share(value) for value in (low, 0.5, 2.0, 30.0, high)]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (pytest.approx(0), pytest.approx(1))


def test_a_scale_has_room_though_all_values_are_alike_or_there_are_none():
    for values in ([4.0, 4.0], [0.0], []):
        low, high = Scale.of(values, False).ends
        assert low < high


def test_a_name_at_an_edge_stands_on_the_side_that_is_inside():
    assert beside([(0.0, 0.5, "a long name")], (430, 240)) in (["middle right"], ["top right"], ["bottom right"])
    assert beside([(1.0, 0.5, "a long name")], (430, 240)) in (["middle left"], ["top left"], ["bottom left"])
    assert beside([], (430, 240)) == []
