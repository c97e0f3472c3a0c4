"""`pairquant export`: a plain model, and what is said of it."""

import json

import pytest
from tiny_models import save_tiny
from typer.testing import CliRunner

import pairquant
from pairquant.cli import app
from pairquant.support.errors import CheckpointError, ConfigError, SourceError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    pairquant.quantize(
        save_tiny(root / "source"), root / "packed", pairquant.QuantConfig(preset="rtn", group_size=32), device="cpu"
    )
    return root / "packed"


def test_a_plain_model_is_written_and_its_size_told(checkpoint, tmp_path):
    done = CliRunner().invoke(app, ["export", str(checkpoint), "--output", str(tmp_path / "plain"), "--to", "fp32"])
    assert done.exit_code == 0, done.output
    assert "MB in fp32 written to" in done.output
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"


def test_what_stands_there_is_not_replaced_unasked(checkpoint, tmp_path):
    arguments = ["export", str(checkpoint), "--output", str(tmp_path / "plain")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert isinstance(CliRunner().invoke(app, arguments).exception, ConfigError)
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("packed", ("--to", "bf61"), ConfigError, "did you mean 'bf16'"),
        ("source", (), CheckpointError, "not quantized with pairwise rotations"),
        ("pakced", (), SourceError, "did you mean 'packed'"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(checkpoint, tmp_path, monkeypatch, name, options, error, message):
    monkeypatch.chdir(checkpoint.parent)
    done = CliRunner().invoke(app, ["export", name, "--output", str(tmp_path / "plain"), *options])
    assert isinstance(done.exception, error), done.output
    assert message in str(done.exception)
    assert not (tmp_path / "plain").exists()
