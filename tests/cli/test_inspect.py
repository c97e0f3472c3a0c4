"""`pairquant inspect` as a user types it."""

from shell import assert_refused, pairquant


def test_inspect_lists_every_block(quantized, workplace):
    done = pairquant(workplace, "inspect", "out")
    assert done.returncode == 0, done.stderr
    for expected in (
        "4 bits, groups of 64, 2 rotations, 4 shared transforms",
        "12 quantized layers",
        "quick",
        "notes.txt",
    ):
        assert expected in done.stdout


def test_inspect_follows_one_weight(quantized, workplace):
    done = pairquant(workplace, "inspect", "out", "--linear", "model.layers.0.mlp.up_proj")
    assert done.returncode == 0, done.stderr
    assert "③ rotated" in done.stdout
    assert "qweight" in done.stdout


def test_errors_are_one_message_without_traceback(workplace):
    assert_refused(workplace, ["inspect", "source"], "not quantized with pairwise rotations")
