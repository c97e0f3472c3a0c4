"""`pairquant eval` as a user types it."""

import json

import pytest
from shell import assert_refused, pairquant


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "source", "--text", "note.txt"], "did you mean 'notes.txt'?"),
        (["eval", "source", "--text", "notes.txt", "--seq-len", "9999"], "Lower --seq-len"),
        (["eval", "custom", "--text", "notes.txt"], "--trust-remote-code"),
    ],
)
def test_errors_are_one_message_without_traceback(directory, arguments, message):
    assert_refused(directory, arguments, message)
