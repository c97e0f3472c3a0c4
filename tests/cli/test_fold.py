"""`pairquant fold`, and `pairquant quantize --transform`."""

import pytest
from shell import pairquant
from typer.testing import CliRunner

from pairquant.cli import app
from pairquant.support.errors import ConfigError

OPTIONS = ("--samples", 4, "--seq-len", 32, "--calibration", "notes.txt", "--device", "cpu")


def test_a_plain_model_is_written_and_the_next_command_works(workplace):
    done = pairquant(
        workplace, "fold", "source", "--output", "folded", "--group-size", 32, "--rotations", 2, "--steps", 5, *OPTIONS
    )
    assert "rotation of the stream  folded" in done.stdout
    assert "scales are folded into 4 norms and 4 pairs of layers" in done.stdout
    assert "--transform none --bits 4 --group-size 32" in done.stdout
    packed = pairquant(
        workplace, "quantize", "folded", "--output", "packed", "--transform", "none", "--group-size", 32, "--preset",
        "quick", *OPTIONS,
    )  # fmt: skip
    assert "bits per weight" in packed.stdout


def test_quantize_folds_by_itself(workplace):
    done = pairquant(
        workplace, "quantize", "source", "--output", "both", "--transform", "folded", "--group-size", 32, "--preset",
        "quick", "--rotations", 2, *OPTIONS,
    )  # fmt: skip
    assert "a rotation of the stream is folded" in done.stdout
    assert "eval both --reference source" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--transform", "fold"), "did you mean 'folded'"),
        (("--transform", "none", "--rotations", "4"), "--rotations has no effect"),
        (("--transform", "folded", "--rotations", "auto"), "rotations is 'auto'"),
        (("--transform", "folded", "--preset", "rtn"), "fits no transform"),
        (("--transform", "none", "--override", "q_proj=rotations:4"), "an override names rotations"),
        (("--transform", "folded", "--target-bpw", "4", "--candidates", "rotations:0|8"), "candidates name rotations"),
    ],
)
def test_contradictions_are_refused_before_any_work(workplace, monkeypatch, options, message):
    monkeypatch.chdir(workplace)
    done = CliRunner().invoke(app, ["quantize", "source", "--output", "none", *options])
    assert isinstance(done.exception, ConfigError), done.output
    assert message in str(done.exception)
