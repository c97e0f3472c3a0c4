"""Files of eval, compare and bench are read into what a report shows, and drawn and tabled as they say."""

import json

import pytest

pytest.importorskip("plotly", reason="the extra `report` is not installed")

from pairquant.errors import ConfigError
from pairquant.report.evidence import against_size_and_speed, measured_plots
from pairquant.report.facts import gather
from pairquant.report.page import write_report
from pairquant.report.results import read


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
    plots = {plot.key: plot.to_dict() for plot in against_size_and_speed(facts.measured, facts.references)}
    assert set(plots) == {f"{what}-by-{over}" for what in ("kl", "answers") for over in ("bits", "speed")} | {
        "perplexity-by-bits"
    }
    (by_bits,) = plots["kl-by-bits"]["data"]
    assert (by_bits["x"], by_bits["text"]) == ([4.0, 4.0], ["quick", "other"])
    (by_speed,) = plots["kl-by-speed"]["data"]
    assert dict(zip(by_speed["text"], by_speed["y"], strict=True)) == {"big": 0, "quick": 0.1, "other": 0.2}
    assert dict(zip(by_speed["text"], by_speed["x"], strict=True)) == {"big": 10, "quick": 11, "other": 12}
    points, original = plots["perplexity-by-bits"]["data"]
    assert "big" not in points["text"]
    assert (original["text"][1], original["y"]) == ("big", [20.0, 20.0])


def test_figures_without_axes_of_their_own(quick, evaluated, benched, write_json):
    files = [write_json("eval.json", evaluated(quick, "big")), write_json("bench.json", benched(quick, "big"))]
    plots = {plot.key: plot.to_dict()["data"] for plot in measured_plots(read(files, {}))}
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
    plot = next(plot for plot in against_size_and_speed(found, {"big"}) if plot.key == "kl-by-bits")
    assert [trace.visible for trace in plot.figure.data] == [True, "legendonly"]
    assert "Click a name" in plot.caption


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
    "content", [{"rows": [{}]}, {"workload": {}, "engine": "e", "device": "d", "model": {"name": "m"}}, {"else": 1}]
)
def test_other_files_are_refused(content, write_json):
    with pytest.raises(ConfigError, match=r"results '.*odd.json'"):
        read([write_json("odd.json", content)], {})


def test_a_checkpoint_is_known_by_its_directory(quick, evaluated, write_json):
    facts = gather([quick], [write_json("eval.json", evaluated("elsewhere/quick", "big"))])
    assert facts.checkpoints[0].measured.evaluations
    assert json.dumps(facts.measured.names()) == '["quick"]'
