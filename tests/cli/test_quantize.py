"""`pairquant quantize` and `presets` as they are typed: options that reach the checkpoint, warnings, the next command."""

import json
import re
import shlex

import pytest
from shell import assert_refused
from tiny_models import TEXT, save_tiny
from typer.testing import CliRunner

from pairquant.checkpoint.read import Checkpoint, ModelFiles
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


def test_the_last_override_that_matches_a_layer_wins(directory):
    first = "model.layers.0.mlp.down_proj"
    done, _ = quantize(
        directory, "--preset", "quick", "--group-size", "64", "--rotations", "2", "--samples", "4", "--seq-len", "32",
        "--calibration", str(TEXT), "--device", "cpu", "--override", "down_proj=bits:8",
        "--override", f"{first}=bits:5,group_size:32,rotations:1",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    checkpoint = Checkpoint.open(ModelFiles.find(str(directory / "out")))
    found = {path: checkpoint.config.spec_of(path) for path in checkpoint.stored.linears()}
    specs = {path: (spec.bits, spec.group_size, spec.rotations) for path, spec in found.items()}
    assert specs.pop(first) == (5, 32, 1)
    assert specs.pop("model.layers.1.mlp.down_proj") == (8, 64, 2)
    assert set(specs.values()) == {(4, 64, 2)}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("down_proj=bits:7", "override 'down_proj=bits:7': bits is 7, allowed: 2, 3, 4, 5, 6, 8"),
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


def test_the_layers_that_are_named_are_the_worst_and_four_bits_name_none(directory):
    _, shown = quantize(directory, *SMALL, "--bits", "2")
    linears = json.loads((directory / "out" / "pairquant.json").read_text())["linears"]
    worst = sorted(linears, key=lambda path: -linears[path]["error"])
    named = re.findall(r"(model\.\S+) \d+%", shown)
    assert named == worst[: len(named)]
    assert f"and {len(worst) - len(named)} more" in shown
    _, shown = quantize(directory, *SMALL)
    assert "relative error is above" not in shown


def test_the_next_command_can_be_typed_as_it_is_shown(directory):
    done, shown = quantize(directory, *SMALL, "--trust-remote-code")
    assert done.exit_code == 0, done.output
    words = shlex.split(shown[shown.index("Next: ") + 6 :])
    source, output = str(directory / "source"), str(directory / "out")
    assert words == ["pairquant", "eval", output, "--reference", source, "--trust-remote-code"]
    done, shown = quantize(directory, *SMALL)
    assert "--trust-remote-code" not in shown


def test_the_next_command_is_not_broken_into_lines(directory):
    done, _ = quantize(directory, *SMALL, "--trust-remote-code")
    following = done.output[done.output.index("Next: ") :]
    assert len(following) > 80, "too short to be broken"
    assert following.count("\n") == 1


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


def test_quantize_shows_errors_sizes_and_the_next_command(quantized, workplace):
    assert quantized.returncode == 0, quantized.stderr
    for expected in (
        "12 linear layers; predicted peak",
        "relative error",
        "bits per weight",
        "→",
        "Next: pairquant eval out",
    ):
        assert expected in quantized.stdout
    entries = json.loads((workplace / "out" / "config.json").read_text())["quantization_config"]
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
        (["quantize", "source", "--output", "out2", "--end-to-end", "-1"], "epochs is -1"),
        (["quantize", "custom", "--output", "out2"], "--trust-remote-code"),
    ],
)
def test_errors_are_one_message_without_traceback(workplace, arguments, message):
    assert_refused(workplace, arguments, message)


def test_the_output_embedding_is_told_of_and_shown_apart(directory):
    done, shown = quantize(directory, *SMALL, "--head-bits", "8")
    assert done.exit_code == 0, done.output
    assert "1 layer at 8 bits, groups of 32, 0 rotations: --head-bits 8" in shown
    assert "the output embedding takes 0.0 MB instead of 0.1 MB in 16 bits" in shown
    assert re.search(r"block +lm_head +time\n +head +0\.\d+", done.output)


def test_a_training_of_the_whole_model_is_shown(directory):
    calibration = ["--samples", "4", "--seq-len", "32", "--calibration", str(TEXT)]
    done, shown = quantize(
        directory, *SMALL, *calibration, "--bits", "2", "--end-to-end", "2", "--set", "end_to_end.scale_rate=1e-2"
    )
    assert done.exit_code == 0, done.output
    assert "at the end the whole model is trained in 2 epochs of 352 tokens, which takes longer than all" in shown
    found = re.search(
        r"whole model: KL to the original on text held out epoch 0 (\S+) epoch 1 \S+ epoch 2 (\S+)", shown
    )
    assert found, done.output
    assert float(found[2]) < float(found[1])


def test_embeddings_are_told_of_and_inspect_lists_them_below_the_blocks(directory):
    done, shown = quantize(directory, *SMALL, "--embedding-bits", "8", "--head-bits", "6")
    assert done.exit_code == 0, done.output
    assert re.search(
        r"the input embedding takes 0.0 MB instead of 0.1 MB in 16 bits; relative error of its rows 0\.0\d\d %", shown
    )
    assert "the output embedding and the input embedding among them" in shown
    done = CliRunner().invoke(app, ["inspect", str(directory / "out")], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    table = done.output[done.output.index("block ") :]
    assert "…" not in table
    assert re.search(r"^embed_tokens  0\.0\d\d  0\.0 MB$", table, re.MULTILINE)
    assert re.search(r"^lm_head  0\.\d\d\d  0\.0 MB$", table, re.MULTILINE)
