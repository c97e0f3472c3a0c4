"""Files that are whole or absent, and JSON that is read without trust."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file

from pairquant.checkpoint.files import checksum, durable, read_json, write_error, write_json, write_tensors
from pairquant.support.errors import CheckpointError


def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})

    def fail(staged):
        staged.write_text("half")
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        durable(file, fail)
    assert read_json(file) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_tensors_are_written_as_everybody_may_read_them(tmp_path):
    file = tmp_path / "a.safetensors"
    write_tensors(file, {"x": torch.arange(6).view(2, 3).T})
    assert torch.equal(load_file(file)["x"], torch.arange(6).view(2, 3).T)
    plain = tmp_path / "plain"
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode
    before = checksum(file)
    write_tensors(file, {"x": torch.ones(1)})
    assert checksum(file) != before


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '"a"', "[" * 100_000, "\udc80"], ids=["none", "{", "list", "text", "deep", "bytes"]
)
def test_what_is_no_object_is_named(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_json(file)


def test_a_full_disk_is_said_as_such():
    said = str(write_error("out", OSError(errno.ENOSPC, "No space left on device"), "Nothing was left behind."))
    assert said == "writing 'out' failed: the disk is full. Nothing was left behind."
    assert "permission" in str(write_error("out", OSError(errno.EACCES, "permission"), ""))


def test_json_is_readable(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1]}
