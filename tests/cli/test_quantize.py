"""`pairquant quantize`: what reaches the checkpoint, what is shown at the end, and what is refused."""

import json
import re
import shlex

import pytest
from shell import assert_refused
from tiny_models import TEXT, save_tiny
from typer.testing import CliRunner

from pairquant.checkpoint.read import Checkpoint, ModelFiles
from pairquant.cli.app import app, console
from pairquant.cli.quantize import _warn_of
from pairquant.support.errors import ConfigError


def test_quantize_shows_errors_sizes_and_the_next_command(quantized, directory):
    assert quantized.returncode == 0, quantized.stderr
    for expected in (
        "12 linear layers in 2 blocks",
        "relative error",
        "bits per weight",
        "→",
        "Next: pairquant eval out",
    ):
        assert expected in quantized.stdout
    entries = json.loads((directory / "out" / "config.json").read_text())["quantization_config"]
    assert entries["provenance"]["seed"] == 3
    assert entries["provenance"]["calibration"] == ["notes.txt"]
    assert len(entries["shared_rotations"]) == 4
    assert entries["modules_to_not_convert"] == [
        "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "lm_head",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "source", "--output", "out2", "--preset", "fsat"], "did you mean 'fast'?"),
        (["quantize", "source", "--output", "source"], "exists. Choose another --output"),
        (["quantize", "sauce", "--output", "out2"], "did you mean 'source'?"),
        (["quantize", "source", "--output", "out2"], "--group-size 64"),
        (["quantize", "custom", "--output", "out2"], "--trust-remote-code"),
    ],
)
def test_errors_are_one_message_without_traceback(directory, arguments, message):
    assert_refused(directory, arguments, message)


@pytest.fixture
def quantize(tmp_path, monkeypatch):
    """The command in this process, on a model in the current directory, without rotations or calibration."""
    monkeypatch.chdir(tmp_path)

    def run(source, output, *arguments):
        save_tiny(tmp_path / source)
        fixed = ("--preset", "rtn", "--group-size", "64", "--rotations", "0", "--device", "cpu")
        return CliRunner().invoke(app, ["quantize", source, "--output", output, *fixed, *arguments])

    return run


def test_overrides_reach_config_json_and_the_last_match_wins(quantize, tmp_path):
    first = "model.layers.0.mlp.down_proj"
    done = quantize(
        "source", "out", "--preset", "quick", "--samples", "4", "--seq-len", "32", "--calibration", str(TEXT),
        "--override", "down_proj=bits:8", "--override", f"{first}=bits:5,group_size:32,rotations:1",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    checkpoint = Checkpoint.open(ModelFiles.find(str(tmp_path / "out")))
    found = {path: checkpoint.config.spec_of(path) for path in checkpoint.stored.linears()}
    specs = {path: (spec.bits, spec.group_size, spec.rotations) for path, spec in found.items()}
    assert specs.pop(first) == (5, 32, 1)
    assert specs.pop("model.layers.1.mlp.down_proj") == (8, 64, 0)
    assert set(specs.values()) == {(4, 64, 0)}
    dynamic = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["dynamic"]
    assert sorted(entry["bits"] for pattern, entry in dynamic.items() if pattern.startswith("+")) == [5, 8]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("down_proj", "override 'down_proj' has no '='. Write PATTERN=bits:2|3|4|5|6|8"),
        ("down_proj=bist:8", "'bist:8' is none of bits:2|3|4|5|6|8, .*; did you mean 'bits'?"),
        ("down_proj=bits:9", "override 'down_proj=bits:9': bits is 9, allowed: 2, 3, 4, 5, 6, 8"),
        ("dwon_proj=bits:8", "names no weight that will be quantized; did you mean 'down_proj'?"),
    ],
)
def test_a_bad_override_is_named_and_nothing_is_written(quantize, tmp_path, override, message):
    done = quantize("source", "out", "--override", override)
    assert isinstance(done.exception, ConfigError)
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), str(done.exception)), done.exception
    assert not (tmp_path / "out").exists()


def test_poor_layers_are_named_at_the_end_worst_first(quantize, tmp_path):
    done = quantize("source", "out", "--bits", "2")
    assert done.exit_code == 0, done.output
    warning = " ".join(done.stdout.rpartition("written to")[2].partition("Next:")[0].split())
    assert "relative error of the output above 20 %:" in warning
    assert "and 9 more. Give these layers more bits (--override) or leave them as they are (--ignore)." in warning
    linears = json.loads((tmp_path / "out" / "pairquant.json").read_text())["linears"]
    worst = sorted(linears, key=lambda path: -linears[path]["error"])[:5]
    assert re.findall(r"(model\S+) \d+%", warning) == worst


def test_four_bits_need_no_warning(quantize):
    done = quantize("source", "out")
    assert done.exit_code == 0, done.output
    assert "above 20 %" not in done.stdout


def test_a_warning_of_few_layers_counts_no_others():
    with console.capture() as captured:
        _warn_of({"layers[0].up": 0.314, "layers[1].up": 0.25})
    shown = " ".join(captured.get().split())
    assert "above 20 %: layers[0].up 31%, layers[1].up 25%. Give these layers more bits" in shown
    assert "more." not in shown
    with console.capture() as captured:
        _warn_of({})
    assert captured.get() == ""


@pytest.mark.parametrize("trust", [(), ("--trust-remote-code",)])
def test_the_next_command_can_be_typed_as_it_is_shown(quantize, trust):
    done = quantize("my source", "my $out", *trust)
    assert done.exit_code == 0, done.output
    following = done.stdout.rpartition("Next: ")[2]
    assert following.count("\n") == 1, "a command that is broken into lines cannot be copied"
    assert shlex.split(following) == ["pairquant", "eval", "my $out", "--reference", "my source", *trust]
