"""`pairquant quantize`: what reaches the checkpoint, what is shown at the end, and what is refused."""

import json

import pytest
from shell import assert_refused


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
