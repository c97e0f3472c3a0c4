"""A checkpoint is written whole or not at all, in shards that readers find."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pairquant.checkpoint import write
from pairquant.checkpoint.write import Entry, require_free, require_space, write_checkpoint
from pairquant.spec.fields import Field
from pairquant.support.errors import ConfigError, ResourceError

TENSORS = {name: torch.arange(10.0) + place for place, name in enumerate("abc")}


def entry(tensor):
    return Entry(Field(tensor.dtype, tuple(tensor.shape)), lambda: tensor)


def describe(directory):
    (directory / "config.json").write_text("{}")


def write_all(output, **options):
    write_checkpoint(
        output, {name: entry(tensor) for name, tensor in TENSORS.items()}, describe, {"seconds": 1}, **options
    )


def test_one_file_while_it_is_small(tmp_path):
    write_all(tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "pairquant.json",
    ]  # fmt: skip
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_shards_have_an_index_that_names_every_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "SHARD_BYTES", 80)
    write_all(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 120
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }  # fmt: skip
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / file)[name], TENSORS[name])


def test_what_fails_leaves_everything_as_it_was(tmp_path):
    write_all(tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def broken():
        raise OSError(28, "No space left on device")

    entries = {"a": entry(TENSORS["a"]), "b": Entry(Field(torch.float32, (10,)), broken)}
    with pytest.raises(ResourceError, match="Nothing was left behind"):
        write_checkpoint(tmp_path / "out", entries, describe, {}, overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_what_killed_runs_left_is_swept_away_or_put_back(tmp_path):
    (tmp_path / ".out.abc.partial").mkdir()
    write_all(tmp_path / ".out.retired")  # as if the process had died between two renames
    write_all(tmp_path / "out", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_an_output_is_only_replaced_if_asked_and_a_model(tmp_path):
    require_free(tmp_path / "new", overwrite=False)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(ConfigError, match="add --overwrite"):
        require_free(tmp_path / "notes", overwrite=False)
    with pytest.raises(ConfigError, match="not a model directory"):
        require_free(tmp_path / "notes", overwrite=True)


def test_a_disk_that_is_too_small_is_named_with_the_need(tmp_path):
    require_space(tmp_path / "a" / "b", 1)
    with pytest.raises(ResourceError, match="needs about 1000000000.00 GB"):
        require_space(tmp_path / "a" / "b", 10**18)
