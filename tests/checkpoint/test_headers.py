"""Which files are a model's weights, and which are left alone."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pairquant.checkpoint import files
from pairquant.checkpoint.files import read_json
from pairquant.checkpoint.headers import StoredTensors, weight_files
from pairquant.support.errors import CheckpointError


@pytest.fixture
def shards(tmp_path):
    """Two shards with an index, and the same weights once more under other names, as some publishers add them."""
    homes = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    for name, home in homes.items():
        save_file({name: torch.ones(3)}, tmp_path / home)
    save_file({"other.a": torch.ones(3)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    return tmp_path


def change_index(directory, **homes):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))


def test_the_index_says_which_files_are_the_weights(shards):
    assert StoredTensors.of_directory(shards).fields.keys() == {"a", "b"}


def test_a_single_file_comes_before_an_index(shards):
    save_file({"c": torch.ones(3)}, shards / "model.safetensors")
    assert StoredTensors.of_directory(shards).fields.keys() == {"c"}


def test_without_an_index_files_are_named_and_not_guessed_at(shards):
    (shards / "model.safetensors.index.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"neither model\.safetensors nor .*, only consolidated\.safetensors, model-1"
    ):
        StoredTensors.of_directory(shards)


def test_weights_in_other_formats_alone_are_named(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin\. .*pickles, are not read.*save_pretrained"):
        weight_files(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_in_8_bit_floats_are_told_apart_from_damage(tmp_path, dtype):
    save_file({"a": torch.ones(3).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="quantized to 8-bit floats already, .*Use the original model in 16 bits"):
        StoredTensors.of_directory(tmp_path)


@pytest.mark.parametrize("home", ["../model-1.safetensors", "/tmp/x.safetensors", "..", "", 7, None])
def test_a_shard_is_beside_its_index(shards, home):
    change_index(shards, a=home)
    with pytest.raises(CheckpointError, match="places tensor a in .* must be a file beside the index"):
        StoredTensors.of_directory(shards)


def test_a_shard_without_what_the_index_says_is_named(shards):
    change_index(shards, a="model-1.safetensors", b="model-1.safetensors")
    with pytest.raises(CheckpointError, match=r"places tensor b in model-1\.safetensors, which does not hold it"):
        StoredTensors.of_directory(shards)


def test_a_tensor_in_two_files_is_named_with_both(shards):
    save_file({"b": torch.ones(3), "a": torch.zeros(3)}, shards / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a is both in .*model-1.* and in .*model-2"):
        StoredTensors.of_directory(shards)


def test_files_outside_the_models_directory_are_refused(shards):
    inside = shards / "inside"
    inside.mkdir()
    with pytest.raises(CheckpointError, match="not in the model's directory"):
        StoredTensors.of_files([inside / ".." / "model-1.safetensors"], inside)
    assert StoredTensors.of_files([shards / "model-1.safetensors"], shards).fields.keys() == {"a"}


def test_files_of_other_formats_are_refused_unopened(tmp_path):
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is no \.safetensors file"):
        StoredTensors.of_files([tmp_path / "pytorch_model.bin"])  # it is not even there


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff{}", b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"])
def test_json_that_is_no_object_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_json(tmp_path / "config.json")


def test_json_larger_than_any_real_one_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "JSON_BYTES", 10)
    (tmp_path / "config.json").write_text('{"a": "0123456789"}')
    with pytest.raises(CheckpointError, match="larger than 10 bytes"):
        read_json(tmp_path / "config.json")
