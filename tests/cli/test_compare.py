"""`pairquant compare`: one table for each part that was asked for, and what is refused before the work."""

import json

import pytest
from typer.testing import CliRunner

from pairquant.cli import app


@pytest.fixture
def compare(workplace, quantized, monkeypatch):
    assert quantized.returncode == 0, quantized.stderr
    monkeypatch.chdir(workplace)
    small = ("--text", "notes.txt", "--seq-len", "64", "--max-tokens", "256", "--device", "cpu")
    return lambda *arguments: CliRunner().invoke(app, ["compare", *map(str, arguments), *small])


def test_the_only_model_is_the_closest_and_the_json_says_the_same(compare, tmp_path):
    done = compare("source", "out", "--json", tmp_path / "compared.json")
    assert done.exit_code == 0, done.output
    rows = {words[0]: words for line in done.stdout.splitlines() if (words := line.split())}
    assert rows["out"][-1] == "closest"
    written = json.loads((tmp_path / "compared.json").read_text())
    original, ours = written["rows"]
    assert (original["name"], ours["name"]) == ("source", "out")
    assert written["closest"]["notes.txt"]["model"] == "out"
    found = ours["evaluation"]["texts"]["notes.txt"]
    assert rows["out"][1] == f"{found['perplexity']:.3f}"
    for absent in ("chains", "answers", "prefill"):
        assert absent not in done.stdout


@pytest.mark.parametrize(("place", "message"), [("nowhere/out.json", "no such directory"), (".", "is a directory")])
def test_a_place_that_cannot_hold_the_json_is_refused_before_the_work(compare, place, message):
    done = compare("source", "out", "--json", place)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
