"""`quantize --format`: one command, and what it refuses before any work."""

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file
from tiny_models import TEXT, save_tiny
from typer.testing import CliRunner

import pairquant
from pairquant.cli import app
from pairquant.jobs import other_formats
from pairquant.jobs.other_formats import quantize_as
from pairquant.support.errors import ConfigError

CONFIG = pairquant.QuantConfig(preset="quick", group_size=32, samples=2, seq_len=32, calibration=(str(TEXT),))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("formats") / "source")


def test_a_model_becomes_a_directory_of_the_format(source, tmp_path):
    summary = quantize_as("gptq", source, tmp_path / "out", CONFIG, device="cpu")
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["sym"] is True
    assert "model.layers.0.mlp.down_proj.g_idx" in load_file(tmp_path / "out" / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "what lay between is removed"
    assert summary.output == tmp_path / "out"
    assert summary.size_after == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_what_fails_after_the_work_leaves_it(source, tmp_path, monkeypatch):
    def full(*_, **__):
        raise ConfigError("no space")

    monkeypatch.setattr(other_formats, "export", full)
    with pytest.raises(ConfigError, match="no space"):
        quantize_as("awq", source, tmp_path / "out", CONFIG, device="cpu")
    monkeypatch.undo()
    assert (tmp_path / "out.paroquant" / "config.json").is_file()
    with pytest.raises(ConfigError, match=r"Finish it: pairquant export .*out\.paroquant --to awq"):
        quantize_as("awq", source, tmp_path / "out", CONFIG, device="cpu")
    pairquant.export(tmp_path / "out.paroquant", tmp_path / "out", "awq")


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("awk", {}, "did you mean 'awq'"),
        ("awq", {"bits": 3}, "has 3 bits, awq holds 4"),
        ("gguf", {"rotations": "auto"}, "gguf holds none"),
        ("gptq", {"target": {"bits_per_weight": 3.5}}, "one form for all"),
        ("awq", {"head_bits": 4}, "quantized embedding"),
        ("gguf", {}, r"is no \.gguf file"),
    ],
)
def test_refused_before_any_work(source, tmp_path, monkeypatch, form, changes, message):
    output = "out.gguf" if form == "gguf" and changes else "out"
    monkeypatch.setattr(other_formats, "quantize", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(ConfigError, match=message):
        quantize_as(form, source, tmp_path / output, replace(CONFIG, recipe=None, **changes))
    assert not list(tmp_path.iterdir())


def test_a_size_chooses_among_the_widths_of_the_format(source, tmp_path):
    quantize_as(
        "compressed-tensors", source, tmp_path / "out", replace(CONFIG, target={"bits_per_weight": 6.5}), device="cpu"
    )
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert {group["weights"]["num_bits"] for group in groups.values()} == {4, 8}


def test_the_command(source, tmp_path):
    output = tmp_path / "out"
    arguments = ["quantize", str(source), "--output", str(output), "--preset", "rtn", "--group-size", "32"]
    result = CliRunner().invoke(app, [*arguments, "--format", "awq"])
    assert result.exit_code == 0, result.output
    assert "vllm serve" in result.output
    result = CliRunner().invoke(app, [*arguments, "--format", "awq", "--push-to-hub", "me/model", "--overwrite"])
    assert "Upload awq with" in " ".join(str(result.exception or result.output).split())
