"""What eval, compare and bench found: to JSON and back, and what is said of files that hold something else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairquant.evaluation.chains import ChainPlan
from pairquant.evaluation.quality import Quality
from pairquant.evaluation.ranking import Gap, Ranking
from pairquant.evaluation.reasoning import AnswerPlan, Answers, Paired
from pairquant.evaluation.results import (
    AnswerResults,
    ChainResults,
    Compared,
    Comparison,
    Evaluation,
    ModelSpeed,
    SpeedResults,
    TaskResults,
    read_results,
)
from pairquant.evaluation.speed import Speed, Workload
from pairquant.evaluation.tasks import Metric
from pairquant.support.errors import ConfigError

PLAIN = Evaluation(model="m", texts={"t": Quality(9, 20.0)})
PARTS = [{"start": 0, "end": 4, "kl": 0.1}, {"start": 4, "end": 9, "kl": 0.3}]


def everything():
    pair = Paired(1, 2, 0.1, (0.0, 0.2), 0.5, 0.7)
    answers = Answers(2, 1, 0.5, (0.1, 0.9), 1.0, 7.5, [True, False])
    metrics = {"small": {"acc": Metric(0.5, 0.1, [True, False]), "ppl": Metric(3.0, None, None)}}
    return Evaluation(
        model="m",
        reference="big",
        texts={"t": Quality(9, 20.0, 0.1, 0.9, (0.05, 0.2), PARTS, [0.1, 0.1])},
        bos=True,
        notices=["t: short"],
        bits_per_weight=4.5,
        engine="vllm",
        device="a CPU",
        versions={"torch": "2.13.0"},
        chains=ChainResults(1, 9, 0.2, None, PARTS, [0.2], [9], 1.0, [None], None, 1.0, ChainPlan(1, 9)),
        answers={"gsm8k": AnswerResults(answers, answers, pair), "alone": AnswerResults(answers, None, None)},
        answer_plan=AnswerPlan(),
        tasks=TaskResults(metrics, None, {"small": {"acc": pair}}),
    )


def speeds():
    return ModelSpeed(name="m", dtype="bfloat16", rows=[Speed(1, 10.0, 5.0, 0.1)])


@pytest.mark.parametrize(
    "found",
    [
        PLAIN,
        everything(),
        Comparison([Compared("m", 10, None, everything(), speeds())], {"t": Ranking("m", {"n": Gap(0.1, None)})}),
        SpeedResults(model=speeds(), workload=Workload(), engine="vllm", device="a GPU", ratios={"load_s": 1.0}),
    ],
    ids=["plain", "everything", "comparison", "speed"],
)
def test_what_is_written_is_read_back(found, tmp_path):
    file = tmp_path / "found.json"
    file.write_text(json.dumps(found.to_dict()))
    assert read_results(file) == found


def test_what_was_not_asked_for_is_not_written():
    written = PLAIN.to_dict()
    assert "chains" not in written
    assert "answers" not in written
    assert written["reference"] is None
    assert list(written)[:3] == ["model", "reference", "texts"]


@given(st.floats(allow_nan=False), st.integers(0, 2**40))
def test_every_number_survives(perplexity, tokens):
    found = Evaluation(model="m", texts={"t": Quality(tokens, perplexity)})
    assert Evaluation.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_divergence_that_is_not_a_number_survives():
    written = json.dumps(Evaluation(model="m", texts={"t": Quality(9, 20.0, float("nan"), 0.0)}).to_dict())
    assert Evaluation.from_dict(json.loads(written)).texts["t"].kl != 0


def test_entries_of_later_versions_are_left_aside():
    assert Evaluation.from_dict(PLAIN.to_dict() | {"later": 1}) == PLAIN


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"texts": {"t": {"tokens": "many", "perplexity": 1.0}}}, "texts.t.tokens is 'many'"),
        ({"texts": {"t": {"tokens": 9}}}, "texts.t.perplexity is missing"),
        ({"texts": []}, r"texts is \[\]"),
        ({"model": 7}, "model is 7"),
        ({"chains": {"chains": 1}}, "chains.tokens is missing"),
        ({"answers": {"gsm8k": {"model": None}}}, "answers.gsm8k.model is None"),
    ],
)
def test_damaged_entries_are_named_with_their_file(change, fault, tmp_path):
    file = tmp_path / "odd.json"
    file.write_text(json.dumps(PLAIN.to_dict() | change))
    with pytest.raises(ConfigError, match=rf"odd.json': {fault}.* Make them with `pairquant eval --json`"):
        read_results(file)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"else": 1}', "not JSON", "[" * 100_000])
def test_files_of_something_else_are_refused(content, tmp_path):
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"results '.*other.json'"):
        read_results(file)
    with pytest.raises(ConfigError, match=r"results '.*lost.json' cannot be read"):
        read_results(tmp_path / "lost.json")
