"""`pairquant eval` from end to end, on a tiny model and its original."""

import json
import subprocess
import sys

import pytest
from tiny_models import TEXT, save_tiny

import pairquant
from pairquant.evaluation.chains import ChainPlan
from pairquant.evaluation.reasoning import AnswerPlan
from pairquant.support.errors import PairQuantError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("assessment")
    config = pairquant.QuantConfig(group_size=64, rotations=2, recipe=pairquant.PRESETS["rtn"])
    source = save_tiny(root / "source", context=1024)
    pairquant.quantize(source, root / "packed", config, device="cpu")
    (root / "sums.jsonl").write_text('{"problem": "1 + 1?", "answer": 2}\n{"question": "2 + 2?", "answer": "4"}\n')
    return root


@pytest.fixture(scope="module")
def command(directory):
    pytest.importorskip("math_verify")
    arguments = (
        "eval", "packed", "--reference", "source", "--text", TEXT, "--seq-len", 64, "--max-tokens", 256, "--chains", 2,
        "--chain-tokens", 6, "--gsm8k", 3, "--boxed", "sums.jsonl", "--answer-tokens", 5, "--device", "cpu",
        "--json", "result.json",
    )  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "pairquant", *map(str, arguments)],
        cwd=directory, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_every_part_is_printed_within_eighty_columns(command):
    assert command.returncode == 0, command.stderr
    for expected in ("top-1 kept", "the original's chains", "never departs", "gsm8k, 3", "sums.jsonl, 2", "no worse"):
        assert expected in command.stdout
    assert max(map(len, command.stdout.splitlines())) <= 80


def test_every_part_is_in_the_json(command, directory):
    result = json.loads((directory / "result.json").read_text())
    (text,) = result["texts"].values()
    assert len(text["kl_of_windows"]) == 4
    assert text["kl_interval"][0] < text["kl"] < text["kl_interval"][1]
    assert result["chains"]["plan"] == {"count": 2, "tokens": 6, "batch": 8, "seed": 0}
    assert len(result["chains"]["departures"]) == 2
    assert set(result["answers"]) == {"gsm8k", "sums.jsonl"}
    answers = result["answers"]["gsm8k"]
    assert len(answers["model"]["outcomes"]) == len(answers["reference"]["outcomes"]) == 3
    assert 0 <= answers["paired"]["no_worse"] <= 1
    assert result["answer_plan"]["tokens"] == 5
    assert "tasks" not in result
    assert result["bits_per_weight"] < 6


def test_a_model_alone_has_accuracies_and_nothing_to_compare(directory):
    found = pairquant.evaluate(
        directory / "packed", texts=[str(TEXT)], seq_len=32, max_tokens=64, gsm8k=2, answers=AnswerPlan(4), device="cpu"
    )
    assert found["answers"]["gsm8k"]["model"]["problems"] == 2
    assert found["answers"]["gsm8k"]["reference"] is found["answers"]["gsm8k"]["paired"] is None
    (text,) = found["texts"].values()
    assert text["kl"] is text["kl_interval"] is text["kl_by_position"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chains": ChainPlan(1)}, "chains are sampled from the original.*Add --reference"),
        ({"reference": "source", "chains": ChainPlan(1, tokens=1000)}, "--chain-tokens is 1000, allowed: [0-9]+, the"),
        ({"gsm8k": 1, "answers": AnswerPlan(2000)}, "--answer-tokens is 2000, allowed: [0-9]+, the model's context of"),
        ({"gsm8k": 5000}, "GSM8K problems is 5000"),
        ({"boxed": ["lost.jsonl"]}, "problem file 'lost.jsonl' does not exist"),
    ],
)
def test_what_cannot_be_is_told_before_weights_are_read(directory, monkeypatch, options, message):
    monkeypatch.chdir(directory)
    monkeypatch.setattr(pairquant.checkpoint.read.ModelFiles, "model", None)
    with pytest.raises(PairQuantError, match=message):
        pairquant.evaluate("packed", texts=[str(TEXT)], seq_len=32, max_tokens=64, device="cpu", **options)
