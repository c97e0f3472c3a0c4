"""Files of eval, compare and bench are read into what a report shows, and drawn and tabled as they say."""

import json
from itertools import combinations

import pytest

pytest.importorskip("plotly", reason="the extra `report` is not installed")

from pairquant.report.evidence import against_size_and_speed, measured_plots
from pairquant.report.facts import gather
from pairquant.report.figures import comparison_plots, strokes
from pairquant.report.page import write_report
from pairquant.report.results import read
from pairquant.report.scatter import Scale, _overlap, beside
from pairquant.report.style import far_apart, strokes_of
from pairquant.support.errors import ConfigError


def plots_of(measured):
    return measured_plots(measured, strokes_of(measured.names(), measured.references))


def test_an_evaluation_tells_of_chains_answers_and_tasks(quick, evaluated, write_json):
    (found,) = read([write_json("eval.json", evaluated(quick, "big"))], {}).evaluations
    assert (found.name, found.reference) == ("quick", "big")
    assert (found.chains.kl, found.chains.departures) == (0.2, [4, 9, None, 4])
    problems, task = found.accuracies
    assert (problems.name, problems.questions, problems.value, problems.original) == ("sums.jsonl", 40, 0.5, 0.6)
    assert (problems.lost, problems.gained, problems.no_worse) == (7, 3, 0.2)
    assert task.name == "small acc"  # perplexities of tasks are no accuracies
    assert task.interval == pytest.approx((0.5 - 1.96 * 0.1, 0.5 + 1.96 * 0.1))


def test_a_bench_tells_of_both_models(quick, benched, write_json):
    ours, original = read([write_json("bench.json", benched(quick, "big"))], {}).speeds
    assert (ours.name, original.name) == ("quick", "big")
    assert ours.setting == "bfloat16, transformers, a CPU"
    assert [row.batch for row in ours.rows] == [1, 4]


def test_a_comparison_tells_of_every_row(quick, compared, write_json):
    found = read([write_json("compare.json", compared("big", quick, "other"))], {})
    assert [each.name for each in found.evaluations] == ["big", "quick", "other"]
    assert [each.size_bytes for each in found.evaluations] == [300, 100, 100]
    assert [each.name for each in found.speeds] == ["big", "quick", "other"]


def test_models_of_one_last_name_are_told_apart(compared, write_json):
    file = write_json("compare.json", compared("runs/big", "runs/a/model", "runs/b/model"))
    found = read([file], {})
    assert found.names() == ["runs/big", "a/model", "b/model"]


def test_models_stand_by_accuracy_size_and_speed(quick, compared, write_json):
    facts = gather([quick], [write_json("compare.json", compared("big", quick, "other"))])
    plots = {plot.key: plot.to_dict() for plot in against_size_and_speed(facts.measured)}
    assert set(plots) == {f"{what}-by-{over}" for what in ("kl", "answers") for over in ("bits", "speed")} | {
        "perplexity-by-bits",
        "kl-by-time",
    }
    by_bits, along_chains = plots["kl-by-bits"]["data"]
    assert (by_bits["x"], by_bits["text"]) == ([4.0, 4.0], ["quick", "other"])
    assert (along_chains["name"], along_chains["y"]) == ("chains of thought", [0.2, 0.2])
    by_speed, _ = plots["kl-by-speed"]["data"]
    assert dict(zip(by_speed["text"], by_speed["y"], strict=True)) == {"big": 0, "quick": 0.1, "other": 0.2}
    assert dict(zip(by_speed["text"], by_speed["x"], strict=True)) == {"big": 10, "quick": 11, "other": 12}
    points, original = plots["perplexity-by-bits"]["data"]
    assert "big" not in points["text"]
    assert (original["text"][1], original["y"]) == ("big", [20.0, 20.0])


def test_figures_without_axes_of_their_own(quick, evaluated, benched, write_json):
    files = [write_json("eval.json", evaluated(quick, "big")), write_json("bench.json", benched(quick, "big"))]
    plots = {plot.key: plot.to_dict()["data"] for plot in plots_of(read(files, {}))}
    assert set(plots) == {"kl-by-position", "departures", "answers", "speed"}
    (together,) = plots["departures"]
    assert (together["x"], together["y"]) == ([0, 4, 4, 9, 30], [100, 75, 50, 25, 25])
    original, ours = plots["answers"]
    assert (original["name"], original["x"]) == ("big", pytest.approx([60, 55]))
    assert (ours["name"], ours["y"], ours["x"]) == ("quick", ["sums.jsonl", "small acc"], [50.0, 50.0])
    assert [(bar["name"], bar["y"]) for bar in plots["speed"]] == [("quick", [11.0, 44.0]), ("big", [10.0, 40.0])]


def test_names_in_a_crowd_are_shown_for_one_text_until_others_are_asked_for(compared, write_json):
    names = ["big", *(f"model-{number}" for number in range(8))]
    content = compared(*names)
    for row in content["rows"]:
        row["evaluation"]["texts"]["more.txt"] = row["evaluation"]["texts"]["wiki.txt"]
    found = read([write_json("compare.json", content)], {})
    plot = next(plot for plot in against_size_and_speed(found) if plot.key == "kl-by-bits")
    assert [trace.visible for trace in plot.figure.data] == [True, "legendonly", "legendonly"]
    assert "Click a name" in plot.caption


def test_many_models_far_apart_take_the_pages_width_and_decades(compared, write_json):
    names = ["big", *(f"model-{number}" for number in range(14))]
    content = compared(*names)
    for number, row in enumerate(content["rows"]):
        row["evaluation"]["texts"]["wiki.txt"] |= {"kl": 0.05 * 1.4**number, "kl_interval": None}
    found = read([write_json("compare.json", content)], {})
    plots = {plot.key: plot for plot in [*against_size_and_speed(found), *plots_of(found)]}
    assert [plots[key].wide for key in ("kl-by-bits", "kl-by-position", "departures")] == [True] * 3
    assert plots["kl-by-bits"].figure.layout.yaxis.type == "log"
    assert {trace.line.dash for trace in plots["departures"].figure.data} == {"solid", "dash"}


def test_departures_are_shown_up_to_the_last_one(evaluated, write_json):
    content = evaluated("model", "big")
    content["chains"] |= {"departures": [4, 9, 2, 4], "plan": {"count": 4, "tokens": 1000}}
    found = read([write_json("eval.json", content)], {})
    plot = next(plot for plot in plots_of(found) if plot.key == "departures")
    assert 9 < plot.figure.layout.xaxis.range[1] < 12


def test_names_stand_where_they_cover_no_other_of_any_series():
    points = [(0.5, 0.5, "one name"), (0.51, 0.51, "another"), (0.5, 0.4, "a third"), (0.97, 0.2, "at the edge")]
    occupied = []
    places = beside(points[:2], (430, 240), occupied) + beside(points[2:], (430, 240), occupied)
    assert len(occupied) == 2 * len(points)
    names = [box for box in occupied if box[2] - box[0] > 10]
    assert not any(_overlap(a, b) for a, b in combinations(names, 2))
    assert places[-1].endswith("left")


def test_narrow_axes_of_decades_have_a_tick_at_every_digit(compared, write_json):
    for spread, tick in ((6.0, "D1"), (50.0, "D2")):
        content = compared("big", "a", "b")
        for row, kl in zip(content["rows"], (1.0, 1.0, spread), strict=True):
            row["evaluation"]["texts"]["wiki.txt"] |= {"kl": kl, "kl_interval": None}
            row["evaluation"].pop("chains", None)
            row["evaluation"]["texts"]["far.txt"] = row["evaluation"]["texts"]["wiki.txt"] | {"kl": kl * 1.5}
        found = read([write_json("compare.json", content)], {})
        plot = next(plot for plot in against_size_and_speed(found) if plot.key == "kl-by-bits")
        assert plot.figure.layout.yaxis.dtick == tick


def test_models_never_departing_rank_behind_all_others(quick, compared, write_json, tmp_path):
    content = compared("big", quick, "other")
    content["rows"][1]["evaluation"]["chains"] |= {"departures": [None] * 4, "departure_median": None}
    write_report([quick], tmp_path / "report.html", results=[write_json("compare.json", content)])
    page = (tmp_path / "report.html").read_text()
    assert "departs at token" in page
    assert 'data-rank="30" class="number">–' in page
    assert 'data-rank="9.0" class="number">9' in page


def test_a_checkpoint_is_not_taken_for_another_model_of_its_name(quick, evaluated, write_json, tmp_path):
    other = tmp_path / "elsewhere" / quick.name
    other.mkdir(parents=True)
    facts = gather([quick], [write_json("eval.json", evaluated(other, "big"))])
    assert facts.measured.names() == [f"elsewhere/{quick.name}"]
    assert not facts.checkpoints[0].measured.evaluations


@pytest.mark.parametrize(
    ("values", "expected"), [([0.1, 1.0], True), ([0.0, 1.0], False), ([0.5, 1.0], False), ([], False)]
)
def test_axes_are_in_decades_only_where_they_can_be(values, expected):
    assert far_apart(values) is expected
    scale = Scale.of(values, expected)
    low, high = scale.ends
    assert low < min(values, default=0.5) <= max(values, default=0.5) < high
    assert (scale.share(low), scale.share(high)) == (pytest.approx(0), pytest.approx(1))


def test_a_decades_middle_is_its_geometric_one():
    assert Scale.of([0.1, 1.0], True).share(10**-0.5) == pytest.approx(0.5)


def test_cards_and_tables_hold_the_numbers(quick, evaluated, benched, write_json, tmp_path):
    files = [write_json("eval.json", evaluated(quick, "big")), write_json("bench.json", benched(quick, "big"))]
    write_report([quick], tmp_path / "report.html", results=files)
    page = (tmp_path / "report.html").read_text()
    for expected in (
        "decoding departs at token 9",
        "the original 60.0 %, no worse: 0.20",
        "11.0/s",
        ">Answers<",
        ">Speed<",
    ):
        assert expected in page
    assert page.count('data-rank="sums.jsonl"') == 2  # beside the others, and in its own panel


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"rows": [{}]}, "rows.0.name is missing"),
        ({"workload": {}, "engine": "e", "device": "d", "model": {"name": "m"}}, "model.dtype is missing"),
        ({"else": 1}, "have no entry rows, workload, texts"),
    ],
)
def test_other_files_are_refused(content, fault, write_json):
    with pytest.raises(ConfigError, match=rf"results '.*odd.json'.*{fault}"):
        read([write_json("odd.json", content)], {})


def test_a_model_of_several_files_is_one_model_in_one_colour(quick, evaluated, compared, benched, write_json):
    alone = evaluated(quick, None)  # without the original: it tells less of the same text
    alone["texts"]["more.txt"] = alone["texts"]["wiki.txt"]
    files = [
        write_json("compare.json", compared("big", quick, "other")),
        write_json("eval.json", alone),
        write_json("bench.json", benched(quick, "big")),
    ]
    facts = gather([quick], files)
    ours = facts.measured.of("quick").evaluations
    assert [(set(each.texts), each.texts["wiki.txt"].kl, each.size_bytes) for each in ours] == [
        ({"wiki.txt", "more.txt"}, 0.1, 100)
    ]
    drawn = {}
    for plot in comparison_plots(facts, strokes(facts)):
        for trace in plot.to_dict()["data"]:
            if plot.key.startswith(("kl-by-position", "departures", "answers", "speed")) and "-by-" not in plot.key[7:]:
                style = trace.get("line") or trace["marker"]
                drawn.setdefault(trace["name"], set()).add(style["color"])
    assert {name: len(colors) for name, colors in drawn.items()} == {"quick": 1, "other": 1, "big": 1}
    assert len({color for colors in drawn.values() for color in colors}) == 3


def test_a_text_measured_again_counts_as_the_last_file_says(quick, evaluated, write_json):
    files = [write_json(f"{kl}.json", evaluated(quick, "big", kl)) for kl in (0.3, 0.2)]
    (found,) = read(files, {}).evaluations
    assert found.texts["wiki.txt"].kl == 0.2


def test_a_checkpoint_is_known_by_its_directory(quick, evaluated, write_json):
    facts = gather([quick], [write_json("eval.json", evaluated("elsewhere/quick", "big"))])
    assert facts.checkpoints[0].measured.evaluations
    assert json.dumps(facts.measured.names()) == '["quick"]'
