"""The figures of checkpoints hold the facts that they are made from; what a checkpoint does not tell is left out."""

from dataclasses import replace

import pytest

pytest.importorskip("plotly", reason="the extra `report` is not installed")

from pairquant.report.facts import ReportFacts, gather
from pairquant.report.figures import checkpoint_plots, comparison_plots, mean_errors, strokes
from pairquant.report.log import BlockRecord, Epoch
from pairquant.spec.linear import Spec

BLOCKS = [BlockRecord(0, 1.504, 3 * 10**9, ()), BlockRecord(1, 2.0, 4 * 10**9, ())]


@pytest.fixture(scope="module")
def facts(quick):
    (found,) = gather([quick]).checkpoints
    return found


@pytest.fixture(scope="module")
def both(quick, trained):
    return gather([quick, trained])


def plots_of(facts):
    return {plot.key: plot for plot in checkpoint_plots(facts, {})}


def compared(report):
    return {plot.key: plot for plot in comparison_plots(report, strokes(report))}


def test_a_run_without_training_on_a_cpu_has_no_losses_and_no_gpu_memory(facts):
    assert list(plots_of(facts)) == ["errors", "magnitude", "pair", "angles", "scales", "seconds"]


def test_every_figure_has_a_title_a_caption_and_something_to_show(facts):
    for plot in plots_of(facts).values():
        assert plot.title
        assert plot.caption.endswith(".")
        assert plot.to_dict()["data"]


def test_a_checkpoint_from_elsewhere_has_only_what_its_weights_tell(facts):
    unknown = [replace(linear, error=None) for linear in facts.linears]
    assert list(plots_of(replace(facts, linears=unknown, blocks=[]))) == ["magnitude", "pair", "angles", "scales"]


def test_without_rotations_there_are_neither_pairs_nor_angles(facts):
    unturned = replace(facts, angles=None, close_up=replace(facts.close_up, pair=None))
    assert not {"pair", "angles"} & plots_of(unturned).keys()


def test_the_error_of_every_layer_stands_in_its_cell_in_percent(facts):
    (map_,) = plots_of(facts)["errors"].figure.data
    found = {
        (kind, block): cell
        for kind, row in zip(map_.y, map_.z, strict=True)
        for block, cell in zip(map_.x, row, strict=True)
    }
    assert found == {(linear.kind, linear.block): pytest.approx(100 * linear.error) for linear in facts.linears}


def test_a_layer_that_a_block_lacks_leaves_its_cell_empty(facts):
    fewer = [linear for linear in facts.linears if (linear.kind, linear.block) != ("up", "1")]
    (map_,) = plots_of(replace(facts, linears=fewer))["errors"].figure.data
    empty = [
        (kind, block)
        for kind, row in zip(map_.y, map_.z, strict=True)
        for block, cell in zip(map_.x, row, strict=True)
        if cell is None
    ]
    assert empty == [("up", "1")]


def test_seconds_and_gpu_memory_are_those_of_each_block(facts):
    plots = plots_of(replace(facts, blocks=BLOCKS))
    (bars,) = plots["seconds"].figure.data
    assert (bars.x, bars.y) == ((0, 1), (1.5, 2.0))
    (line,) = plots["memory"].figure.data
    assert line.y == (3.0, 4.0)
    assert plots["memory"].figure.layout.yaxis.title.text == "GB"


def test_stages_follow_each_other_along_the_epochs(facts):
    history = (
        Epoch(0, 0, None, 8.0), Epoch(0, 1, 5.0, 6.0), Epoch(0, 2, 4.0, 5.0), Epoch(1, 0, None, 5.0), Epoch(1, 1, 3.0, 4.0),
    )  # fmt: skip
    trained = [replace(block, history=history) for block in BLOCKS]
    figure = plots_of(replace(facts, blocks=trained))["training"].figure
    validation = [trace for trace in figure.data if trace.name == "validation"]
    losses = [trace for trace in figure.data if trace.name == "training"]
    assert [trace.x for trace in validation] == [(0, 1, 2, 2, 3)] * 2
    assert validation[0].y == (8.0, 6.0, 5.0, 5.0, 4.0)
    assert losses[0].y == (None, 5.0, 4.0, None, 3.0)
    assert [trace.showlegend for trace in validation] == [True, False]
    assert {trace.visible for trace in losses} == {"legendonly"}
    assert validation[0].line.color != validation[1].line.color


def test_only_trained_blocks_have_a_line(facts):
    trained = [replace(BLOCKS[0], history=(Epoch(0, 0, None, 8.0),)), BLOCKS[1]]
    figure = plots_of(replace(facts, blocks=trained))["training"].figure
    assert [trace.x for trace in figure.data] == [(0,), (0,)]


def test_the_close_up_says_whose_weight_it_is(facts):
    for exact, told in (
        (True, "The original's weight."),
        (False, "The decoded weight: the original is not on this machine."),
    ):
        plots = plots_of(replace(facts, close_up=replace(facts.close_up, exact=exact)))
        for key in ("magnitude", "pair"):
            assert plots[key].caption.startswith(facts.close_up.path)
            assert plots[key].caption.endswith(told)


def test_magnitudes_and_the_pair_are_those_of_the_close_up(facts):
    plots, close_up = plots_of(facts), facts.close_up
    before, after = plots["magnitude"].figure.data
    assert (before.name, after.name) == ("before", "after")
    assert list(before.y) == close_up.magnitude_before.tolist()
    assert list(after.y) == close_up.magnitude_after.tolist()
    before, after = plots["pair"].figure.data
    assert [list(point) for point in zip(after.x, after.y, strict=True)] == close_up.points_after.tolist()
    axes = plots["pair"].figure.layout
    assert (axes.xaxis.title.text, axes.yaxis.title.text) == tuple(f"weight of channel {c}" for c in close_up.pair)


def test_shares_of_a_histogram_are_percent_of_each_kind(facts):
    for key in ("angles", "scales"):
        for trace in plots_of(facts)[key].figure.data:
            assert sum(trace.y) == pytest.approx(100, rel=1e-4), (key, trace.name)


def test_errors_by_block_set_checkpoints_side_by_side(both):
    figure = compared(both)["errors-by-block"].figure
    assert [trace.name for trace in figure.data] == ["quick", "trained"]
    for trace, checkpoint in zip(figure.data, both.checkpoints, strict=True):
        assert dict(zip(trace.x, trace.y, strict=True)) == {
            block: pytest.approx(100 * mean) for block, mean in mean_errors(checkpoint.linears).items()
        }
        assert trace.line.color == strokes(both)[checkpoint.name].color
    assert len({trace.line.color for trace in figure.data}) == 2


def test_one_checkpoint_or_one_of_known_errors_is_not_compared(both):
    quick, trained = both.checkpoints
    assert "errors-by-block" not in compared(ReportFacts([quick], both.measured))
    unknown = replace(trained, linears=[replace(linear, error=None) for linear in trained.linears])
    assert "errors-by-block" not in compared(ReportFacts([quick, unknown], both.measured))


def test_a_blocks_mean_is_over_the_layers_whose_error_is_known(facts):
    first = [linear for linear in facts.linears if linear.block == "0"][:3]
    errors = [replace(linear, error=error) for linear, error in zip(first, (0.1, 0.3, None), strict=True)]
    assert mean_errors(errors) == {"0": pytest.approx(0.2)}
    assert mean_errors([replace(first[0], error=None)]) == {}


def test_names_are_text_and_no_markup(both):
    first, second = both.checkpoints
    report = ReportFacts([replace(first, name="<i>q"), second], both.measured)
    assert compared(report)["errors-by-block"].figure.data[0].name == "&lt;i&gt;q"


def test_layers_stored_alike_have_no_map_of_bits_and_others_show_theirs(facts):
    assert "forms" not in plots_of(facts)
    mixed = [
        replace(linear, layout=replace(linear.layout, spec=Spec(8, 32, 0))) if linear.kind == "up" else linear
        for linear in facts.linears
    ]
    (map_,) = plots_of(replace(facts, linears=mixed))["forms"].figure.data
    usual = facts.linears[0].layout.bits
    assert {kind: set(row) for kind, row in zip(map_.y, map_.z, strict=True)} == {
        kind: {8 if kind == "up" else usual} for kind in map_.y
    }
    texts = dict(zip(map_.y, map_.text, strict=True))
    assert set(texts["up"]) == {"8 bits, groups of 32, 0 rotations"}
