"""The command line as a user types it."""

import json
import subprocess
import sys

import pytest
from tiny_models import byte_tokenizer, save_tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    save_tiny(root / "source")
    (root / "custom").mkdir()
    custom = {"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig"}}
    (root / "custom" / "config.json").write_text(json.dumps(custom))
    byte_tokenizer().save_pretrained(root / "custom")
    (root / "notes.txt").write_text("all work and no play makes jack a dull boy. " * 60)
    return root


def pairquant(directory, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "pairquant", *map(str, arguments)],
        cwd=directory, capture_output=True, text=True, check=False, timeout=300, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def quantized(directory):
    return pairquant(
        directory, "quantize", "source", "--output", "out", "--preset", "quick", "--group-size", "auto", "--rotations", 2,
        "--samples", 4, "--seq-len", 32, "--calibration", "notes.txt", "--share-rotations", "--ignore", "o_proj",
        "--device", "cpu", "--seed", 3,
    )  # fmt: skip


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


def test_the_next_command_works_and_writes_json(quantized, directory):
    done = pairquant(
        directory, "eval", "out", "--reference", "source", "--text", "notes.txt", "--seq-len", 64, "--max-tokens", 256,
        "--json", "result.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((directory / "result.json").read_text())
    assert set(result) >= {"model", "texts", "bits_per_weight", "device", "versions"}
    row = result["texts"]["notes.txt"]
    assert row["tokens"] == 4 * 63
    assert row["perplexity"] > 1
    assert row["kl"] > 0
    assert 0 <= row["top1"] <= 1
    assert 4 < result["bits_per_weight"] < 7  # the transforms weigh much in a tiny model


def test_inspect_lists_every_block(quantized, directory):
    done = pairquant(directory, "inspect", "out")
    assert done.returncode == 0, done.stderr
    for expected in (
        "4 bits, groups of 64, 2 rotations, 4 shared transforms",
        "12 quantized layers",
        "quick",
        "notes.txt",
    ):
        assert expected in done.stdout


def test_inspect_follows_one_weight(quantized, directory):
    done = pairquant(directory, "inspect", "out", "--linear", "model.layers.0.mlp.up_proj")
    assert done.returncode == 0, done.stderr
    assert "③ rotated" in done.stdout
    assert "qweight" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "source", "--output", "out2", "--preset", "fsat"], "did you mean 'fast'?"),
        (["quantize", "source", "--output", "source"], "exists. Choose another --output"),
        (["quantize", "sauce", "--output", "out2"], "did you mean 'source'?"),
        (["quantize", "source", "--output", "out2"], "--group-size 64"),
        (["eval", "source", "--text", "note.txt"], "did you mean 'notes.txt'?"),
        (["eval", "source", "--text", "notes.txt", "--seq-len", "9999"], "Lower --seq-len"),
        (["quantize", "custom", "--output", "out2"], "--trust-remote-code"),
        (["eval", "custom", "--text", "notes.txt"], "--trust-remote-code"),
        (["inspect", "source"], "not quantized with pairwise rotations"),
    ],
)
def test_errors_are_one_message_without_traceback(directory, arguments, message):
    done = pairquant(directory, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (directory / "out2").exists()
