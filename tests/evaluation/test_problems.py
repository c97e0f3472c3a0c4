"""Problems with answers: the bundled ones, and files of several kinds."""

import json

import pytest

from pairquant.evaluation.problems import INSTRUCTION, Problem, from_file, gsm8k
from pairquant.support.errors import ConfigError, TextError


def test_the_bundled_problems_have_numbers_for_answers():
    found = gsm8k(1319)
    assert len(found) == 1319
    assert all(problem.answer.lstrip("-").replace(",", "").replace(".", "").isdigit() for problem in found)
    assert "####" not in found[0].question
    assert gsm8k(3) == found[:3]


@pytest.mark.parametrize("count", [0, 1320])
def test_no_more_and_no_fewer_than_there_are(count):
    with pytest.raises(ConfigError, match=f"is {count}, allowed: 1 to 1319"):
        gsm8k(count)


def test_a_problem_is_asked_with_the_instruction():
    assert Problem("1 + 1?", "2").request == f"1 + 1?\n\n{INSTRUCTION}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"problem": "1 + 1?", "answer": "2"}\n{"question": "2 + 2?", "answer": 4}\n'),
        ("a.JSON", json.dumps([{"problem": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": 4}])),
        ("a.csv", "problem,answer\n1 + 1?,2\n2 + 2?,4\n"),
    ],
)
def test_files_of_every_kind(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    assert from_file(tmp_path / name) == [Problem("1 + 1?", "2"), Problem("2 + 2?", "4")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "1 + 1", "ends in '.txt', allowed: "),
        ("a.jsonl", "", "holds no problems"),
        (
            "a.jsonl",
            '{"problem": "1 + 1?"}',
            r"needs texts 'problem' or 'question', and 'answer'; it has \['problem'\]",
        ),
        ("a.jsonl", '{"problem": "1 + 1?", "answer": true}', "needs texts"),
        ("a.jsonl", '["1 + 1?"]', "it has list"),
        ("a.jsonl", '{"problem": "\\ud800", "answer": "2"}', "lone surrogate"),
    ],
)
def test_other_files_are_refused_with_the_place(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=message):
        from_file(tmp_path / name)
    with pytest.raises(TextError, match="does not exist"):
        from_file(tmp_path / "lost.jsonl")
