"""`pairquant quantize` and `presets` as they are typed: options that reach the checkpoint, warnings, the next command."""

import json
import shlex

import pytest
from tiny_models import TEXT, save_tiny
from typer.testing import CliRunner

from pairquant.cli import app
from pairquant.support.errors import ConfigError

SMALL = ["--preset", "rtn", "--group-size", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantize command")  # with a space in it
    save_tiny(root / "source")
    return root


def quantize(directory, *arguments):
    words = ["quantize", str(directory / "source"), "--output", str(directory / "out"), "--overwrite", *arguments]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "80"})
    return done, " ".join(done.output.split())


def test_overrides_reach_the_checkpoint_and_are_told(directory):
    done, shown = quantize(
        directory, *SMALL, "--override", "down_proj=bits:8", "--override", "v_proj=bits:5,group_size:64"
    )
    assert done.exit_code == 0, done.output
    entries = json.loads((directory / "out" / "config.json").read_text())["quantization_config"]
    stored = {tuple(sorted(changes.items())) for changes in entries["dynamic"].values() if changes}
    assert stored == {(("bits", 8),), (("bits", 5), ("group_size", 64))}
    assert "2 layers at 8 bits, groups of 32, 0 rotations: --override down_proj=bits:8" in shown


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("down_proj=bits:7", "bits is 7, allowed: 2, 3, 4, 5, 6, 8"),
        ("down_porj=bits:8", "did you mean 'down_proj'"),
        ("down_proj", "PATTERN="),
        ("down_proj=bit:8", "did you mean 'bits'"),
    ],
)
def test_a_bad_override_is_refused_before_the_work(directory, override, message):
    done, _ = quantize(directory, *SMALL, "--override", override)
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)


def test_layers_that_came_out_badly_are_named_once(directory):
    done, shown = quantize(directory, *SMALL, "--bits", "2")
    assert done.exit_code == 0, done.output
    assert shown.count("relative error is above 20%") == 1
    assert "more (`pairquant inspect` lists them)" in shown
    assert "(--override)" in shown


def test_the_next_command_can_be_typed_as_it_is_shown(directory):
    done, shown = quantize(directory, *SMALL, "--trust-remote-code")
    assert done.exit_code == 0, done.output
    words = shlex.split(shown[shown.index("Next: ") + 6 :])
    source, output = str(directory / "source"), str(directory / "out")
    assert words == ["pairquant", "eval", output, "--reference", source, "--trust-remote-code"]
    done, shown = quantize(directory, *SMALL)
    assert "--trust-remote-code" not in shown


def test_an_unknown_group_size_or_text_is_refused(directory):
    for arguments, message in (
        (["--group-size", "half"], "group_size is 'half'"),
        (["--group-size", "32", "--calibration", str(TEXT.with_name("lost.txt"))], "does not exist"),
        (["--set", "sweep=3"], "did you mean 'sweeps'"),
    ):
        done, _ = quantize(directory, "--device", "cpu", *arguments)
        assert message in str(done.exception)


def test_presets_are_shown_one_or_all():
    shown = CliRunner().invoke(app, ["presets"], env={"COLUMNS": "80"}).output
    assert all(name in shown for name in ("fast", "best", "paper", "quick", "gptq", "rtn"))
    assert max(map(len, shown.splitlines())) <= 80
    alone = CliRunner().invoke(app, ["presets", "best"]).output
    assert "best" in alone
    assert "paper" not in alone
    assert isinstance(CliRunner().invoke(app, ["presets", "bset"]).exception, ConfigError)
