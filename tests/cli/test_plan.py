"""`pairquant plan`, and `quantize` with a size or a plan, as they are typed."""

import json

import pytest
from tiny_models import TEXT, save_tiny
from typer.testing import CliRunner

from pairquant.checkpoint.read import Checkpoint, ModelFiles
from pairquant.cli import app
from pairquant.support.errors import ConfigError

TEXT_OPTIONS = ["--samples", "4", "--seq-len", "32", "--calibration", str(TEXT), "--device", "cpu"]
FORM = ["--group-size", "32", "--rotations", "2"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan command")
    save_tiny(root / "source")
    return root


def typed(*words):
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "80"})
    return done, " ".join(done.output.split())


def test_a_plan_is_shown_written_and_followed(directory):
    file = directory / "plan.json"
    done, shown = typed(
        "plan",
        directory / "source",
        "--output",
        file,
        "--target-bpw",
        "5",
        *FORM,
        *TEXT_OPTIONS,
        "--override",
        "down_proj=bits:8",
    )
    assert done.exit_code == 0, done.output
    assert "bits of blocks 0 to 1" in shown
    assert "down 88" in shown
    assert "bits per weight, 0.5 MB in all; predicted change of the output: 0." in shown
    assert f"quantize '{directory / 'source'}' --plan '{file}'" in shown
    assert max(len(line) for line in done.output.split("Next:")[0].splitlines() if "predicted" not in line) <= 80
    done, shown = typed(
        "quantize", directory / "source", "--output", directory / "out", "--preset", "rtn", "--plan", file
    )
    assert done.exit_code == 0, done.output
    assert "layers at 8 bits, groups of 32, 0 rotations: the plan" in shown
    checkpoint = Checkpoint.open(ModelFiles.find(str(directory / "out")))
    assert checkpoint.config.spec_of("model.layers.0.mlp.down_proj").bits == 8
    again, _ = typed(
        "plan", directory / "source", "--output", directory / "again.json", "--target-size", "480KB", *FORM,
        "--measured", file, "--override", "down_proj=bits:8", "--device", "cpu",
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    first, second = (json.loads(f.read_text())["layers"] for f in (file, directory / "again.json"))
    assert first.keys() == second.keys()


def test_few_transforms_are_shown(directory):
    done, shown = typed(
        "plan", directory / "source", "--output", directory / "few.json", *FORM, "--rotations", "auto", *TEXT_OPTIONS
    )
    assert done.exit_code == 0, done.output
    assert "rotations (· none) of blocks 0 to 1" in shown
    assert "5 of 8 inputs rotated" in shown
    assert "·" in shown


def test_quantize_shows_the_plan_it_makes(directory):
    done, shown = typed(
        "quantize", directory / "source", "--output", directory / "sized", "--preset", "quick", "--target-bpw", "5", *FORM,
        *TEXT_OPTIONS,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "bits of blocks 0 to 1" in shown
    assert "Next: pairquant eval" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target-bpw", "4", "--bits", "3"], "--bits has no effect beside a target size"),
        (["--plan", "PLAN", "--group-size", "64"], "--group-size has no effect beside --plan"),
        (
            ["--candidates", "bits:3"],
            "--candidates has no effect without --target-bpw, --target-size or --rotations auto",
        ),
        (["--target-bpw", "4", "--target-size", "1GB"], "--target-bpw and --target-size are both given"),
        (["--target-size", "many"], "target size is 'many'"),
        (["--target-bpw", "4", "--candidates", "bits:9"], "candidate bits is 9"),
        (["--head-bits", "4", "--ignore", "lm_head"], "--ignore lm_head leaves it"),
        (["--preset", "rtn", "--target-bpw", "4", "--candidates", "all"], "because it fits no transform"),
        (["--plan", "missing.json"], "the plan 'missing.json' cannot be read"),
    ],
)
def test_options_that_contradict_each_other_are_refused(directory, words, message):
    (directory / "some.json").write_text(json.dumps({"pairquant_plan": 1, "default": {}, "layers": {}}))
    words = [str(directory / "some.json") if word == "PLAN" else word for word in words]
    done, _ = typed("quantize", directory / "source", "--output", directory / "never", *words)
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)
    assert not (directory / "never").exists()


def test_a_plan_needs_a_size_and_a_place(directory):
    done, _ = typed("plan", directory / "source", "--output", directory / "x.json", *TEXT_OPTIONS)
    assert "a plan needs a size or fewer transforms: give --target-bpw, --target-size or --rotations auto" in str(
        done.exception
    )
    done, _ = typed("plan", directory / "source", "--output", directory / "no" / "x.json", "--target-bpw", "4")
    assert "there is no directory" in str(done.exception)
