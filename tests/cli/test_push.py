"""`pairquant push`: its options reach the repository and the model card."""

import functools
import json
import shutil

import huggingface_hub
import pytest
from fake_hub import fake_hub
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from pairquant.cli import app
from pairquant.hub import upload
from pairquant.support.errors import ConfigError, SourceError


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with fake_hub({"org/original": "apache-2.0"}) as hub:
        monkeypatch.setattr(upload, "HfApi", functools.partial(huggingface_hub.HfApi, hub.address, "hf_writer"))
        yield hub


@pytest.fixture
def push(workplace, quantized, hub, tmp_path, monkeypatch):
    """The command in this process, beside a copy of the checkpoint: it writes the card there."""
    assert quantized.returncode == 0, quantized.stderr
    shutil.copytree(workplace / "out", tmp_path / "my out")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["push", *map(str, arguments)])


def card_of(hub, name):
    return ModelCard(hub.repos[name]["files"]["README.md"].decode())


def test_it_says_where_the_model_is(push, hub):
    done = push("my out", "tiny")
    assert done.exit_code == 0, done.exception
    assert f"my out is at {hub.address}/ann/tiny\n" in done.stdout
    assert not hub.repos["ann/tiny"]["private"]


def test_every_option_reaches_the_hub(push, hub, tmp_path):
    row = {"tokens": 12345, "perplexity": 6.78901, "kl": 0.01234, "top1": 0.98765}
    evaluation = {"model": "my out", "texts": {"notes.txt": row}, "device": "one CPU"}
    (tmp_path / "results.json").write_text(json.dumps(evaluation))
    options = ("--private", "--base-model", "org/original", "--license", "mit", "--results", "results.json")
    done = push("my out", "team/tiny", *options)
    assert done.exit_code == 0, done.exception
    assert hub.repos["team/tiny"]["private"]
    card = card_of(hub, "team/tiny")
    assert (card.data.base_model, card.data.license) == ("org/original", "mit")
    assert "| notes.txt | 12,345 | 6.789 | 0.0123 | 0.9877 |" in card.text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("nowhere", "tiny"), SourceError, "is no directory"),
        (("my out", "taem/tiny"), ConfigError, "did you mean 'team'"),
        (("my out", "tiny", "--results", "nowhere.json"), ConfigError, "nowhere.json"),
    ],
)
def test_mistakes_are_told_before_a_repository_is_made(push, hub, arguments, error, message):
    done = push(*arguments)
    assert isinstance(done.exception, error), done.output
    assert message in str(done.exception)
    assert hub.repos == {}
