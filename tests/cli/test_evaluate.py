"""`pairquant eval`: a table, the notices, and a file that the report and the model card read."""

import pytest
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
