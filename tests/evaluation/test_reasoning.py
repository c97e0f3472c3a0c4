r"""Answers are found, graded and compared; problems come from the package and from files."""

import json

import pytest
from tiny_models import byte_tokenizer, tiny_model

from pairquant.evaluation.grading import same_number
from pairquant.evaluation.problems import Problem, from_file, gsm8k
from pairquant.evaluation.reasoning import AnswerPlan, answer, compare
from pairquant.support.errors import ConfigError, TextError


def test_gsm8k_answers_are_their_final_numbers():
    problems = gsm8k(1319)
    assert problems[0].question.startswith("Janet")
    assert problems[0].answer == "18"
    assert all(same_number(f"#### {problem.answer}", problem.answer) for problem in problems)
    with pytest.raises(ConfigError, match="is 1320, allowed: 1 to 1319"):
        gsm8k(1320)


def test_files_of_problems(tmp_path):
    file = tmp_path / "aime.jsonl"
    rows = [{"problem": "1 + 1?", "answer": 2}, {"question": "Half?", "answer": r"\frac12", "level": 5}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert from_file(file) == [Problem("1 + 1?", "2"), Problem("Half?", r"\frac12")]
    assert r"\boxed{}" in from_file(file)[0].request


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("aime.json", '[{"problem": "1 + 1?", "answer": 2}]'),
        ("aime.JSONL", '{"problem": "1 + 1?", "answer": 2}'),
        ("aime.csv", "question,answer\n1 + 1?,2\n"),
    ],
)
def test_files_of_problems_of_other_kinds(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert from_file(tmp_path / name) == [Problem("1 + 1?", "2")]


def test_problems_in_files_of_an_unknown_kind_are_refused(tmp_path):
    (tmp_path / "aime.txt").write_text("1 + 1?")
    with pytest.raises(TextError, match="ends in '.txt', allowed: .jsonl, .json, .csv"):
        from_file(tmp_path / "aime.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"problem": "?"}', "line 1: needs texts 'problem' or 'question', and 'answer'; it has ['problem']"),
        ('{"problem": "?", "answer": true}', "line 1"),
        ("[1]", "it has list"),
        ('{"problem": "?", "answer": 1}\n{', "line 2: not JSON"),
        ("\n", "holds no problems"),
        (r'{"problem": "\ud800", "answer": 1}', "line 1: half of a character"),
        (None, "does not exist"),
    ],
)
def test_faults_of_files_are_named(tmp_path, content, message):
    file = tmp_path / "problems.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(TextError) as raised:
        from_file(file)
    assert message in str(raised.value)


def test_answers_are_decoded_graded_and_counted():
    model, tokenizer, asked = tiny_model(), byte_tokenizer(), []

    def is_right(number, text):
        asked.append((number, text))
        return number != 1

    prompts = [tokenizer(text)["input_ids"] for text in ("one", "number two", "3")]
    found = answer(model, tokenizer, prompts, is_right, AnswerPlan(tokens=6, batch=2))
    assert [number for number, _ in asked] == [0, 1, 2]
    assert all(isinstance(text, str) for _, text in asked)
    assert found.outcomes == [True, False, True]
    assert (found.problems, found.correct) == (3, 2)
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.interval[0] < 2 / 3 < found.interval[1]
    assert found.tokens <= 6


def test_temperature_samples_by_seed():
    model, tokenizer, texts = tiny_model(), byte_tokenizer(), []
    prompts = [tokenizer("one")["input_ids"]]
    for plan in (AnswerPlan(12, temperature=1.0, seed=1), AnswerPlan(12, temperature=1.0, seed=1), AnswerPlan(12)):
        answer(model, tokenizer, prompts, lambda _, text: texts.append(text) is None, plan)
    assert texts[0] == texts[1] != texts[2]


def test_pairs():
    ours = [True] * 10 + [False] * 6 + [True]
    theirs = [True] * 10 + [True] * 5 + [False] + [False]
    found = compare(ours, theirs)
    assert (found.lost, found.gained) == (5, 1)
    assert found.difference == pytest.approx(-4 / 17)
    assert found.interval[0] < found.difference < found.interval[1]
    assert found.p_value == pytest.approx(2 * 7 / 64)
    assert found.no_worse == pytest.approx(8 / 128)


@pytest.mark.parametrize("settings", [{"tokens": 0}, {"batch": 0}, {"temperature": -1.0}])
def test_plans_check_themselves(settings):
    with pytest.raises(ConfigError, match="allowed"):
        AnswerPlan(**settings)
