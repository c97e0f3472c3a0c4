"""`pairquant eval`: a table, the notices, and a file that the report and the model card read."""

import json

import pytest
from shell import assert_refused, pairquant
from tiny_models import TEXT, save_tiny
from typer.testing import CliRunner

from pairquant.cli import app
from pairquant.evaluation.results import Evaluation, read_results


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("eval") / "model", context=64)


def evaluate(model, *arguments):
    words = ["eval", str(model), "--text", str(TEXT), "--max-tokens", "512", "--device", "cpu", *arguments]
    return CliRunner().invoke(app, words, env={"COLUMNS": "80"})


def test_the_file_holds_what_the_table_shows(model, tmp_path):
    done = evaluate(model, "--reference", str(model), "--seq-len", "64", "--json", str(tmp_path / "eval.json"))
    assert done.exit_code == 0, done.output
    found = read_results(tmp_path / "eval.json")
    assert isinstance(found, Evaluation)
    (quality,) = found.texts.values()
    assert quality.kl == pytest.approx(0, abs=1e-6)
    for expected in (f"{quality.perplexity:.3f}", f"{quality.tokens:,}", "1.0000", TEXT.name, "bits per weight, on"):
        assert expected in done.output
    assert max(map(len, done.output.splitlines())) <= 80


def test_windows_past_the_models_context_are_told(model):
    done = evaluate(model, "--seq-len", "128")
    assert done.exit_code == 0, done.output
    assert "windows of 128 tokens are longer than the 64" in " ".join(done.output.split())


def test_a_file_that_cannot_be_written_is_refused_before_the_work(model, tmp_path):
    done = evaluate(model, "--json", str(tmp_path))
    assert done.exit_code == 2
    assert "is a directory" in " ".join(done.output.replace("│", " ").split())


def test_the_next_command_works_and_writes_json(quantized, workplace):
    done = pairquant(
        workplace, "eval", "out", "--reference", "source", "--text", "notes.txt", "--seq-len", 64, "--max-tokens", 256,
        "--json", "result.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((workplace / "result.json").read_text())
    assert set(result) >= {"model", "texts", "bits_per_weight", "device", "versions"}
    row = result["texts"]["notes.txt"]
    assert row["tokens"] == 4 * 63
    assert row["perplexity"] > 1
    assert row["kl"] > 0
    assert 0 <= row["top1"] <= 1
    assert 4 < result["bits_per_weight"] < 7  # the transforms weigh much in a tiny model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "source", "--text", "note.txt"], "did you mean 'notes.txt'?"),
        (["eval", "source", "--text", "notes.txt", "--seq-len", "9999"], "Lower --seq-len"),
        (["eval", "custom", "--text", "notes.txt"], "--trust-remote-code"),
    ],
)
def test_errors_are_one_message_without_traceback(workplace, arguments, message):
    assert_refused(workplace, arguments, message)
