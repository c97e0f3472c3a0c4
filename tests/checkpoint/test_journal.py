"""What a run has finished is kept, checked, and never mixed with another run's."""

import errno
import json
import threading

import pytest
import torch
from packed import random_packed

from pairquant.checkpoint import files
from pairquant.checkpoint.journal import Journal
from pairquant.support.errors import CheckpointError, ConfigError, ResourceError

IDENTITY = {"config": {"samples": 64, "recipe": {"steps": 150}}, "source": "abc"}
PACKED = {f"layers.{i}.up": random_packed(64, 128, 64, 4, i) for i in range(3)}


def tensors(index):
    path = f"layers.{index}.up"
    return {f"{path}.{name}": t for name, t in PACKED[path].tensors.items()} | {f"layers.{index}.norm": torch.ones(4)}


def opened(directory, identity=IDENTITY):
    journal = Journal(directory, {path: packed.layout for path, packed in PACKED.items()})
    journal.lock()
    journal.begin(identity)
    return journal


@pytest.fixture
def directory(tmp_path):
    journal = opened(tmp_path / "journal")
    for index in range(2):
        journal.append(tensors(index), {"path": f"layers.{index}", "errors": {"up": 0.5}})
    journal.close()
    return tmp_path / "journal"


def test_what_was_finished_comes_back(directory):
    journal = opened(directory)
    assert [entry["path"] for entry in journal.entries] == ["layers.0", "layers.1"]
    packed, others = journal.packed(1)
    assert torch.equal(packed["layers.1.up"]["qweight"], PACKED["layers.1.up"]["qweight"])
    assert torch.equal(others["layers.1.norm"], torch.ones(4))


def test_another_run_is_refused_and_says_what_differs(directory):
    other = {"config": {"samples": 32, "recipe": {"steps": 10}}, "source": "abc"}
    with pytest.raises(ConfigError, match=r"config.samples: 64 then, 32 now\n  config.recipe.steps: 150 then, 10 now"):
        opened(directory, other)
    assert opened(directory).count == 2


def test_two_runs_at_once_are_refused(directory):
    first = opened(directory)
    with pytest.raises(ConfigError, match="another run is writing"):
        opened(directory)
    first.close()
    assert opened(directory).count == 2


@pytest.mark.parametrize("damage", [lambda content: content[:-7], lambda content: content[:-1] + b"?", lambda _: b""])
def test_a_damaged_block_is_named_and_the_remedy_works(directory, damage):
    file = directory / "block-00001.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"block-00001.safetensors is damaged.*Delete block-00001.json"):
        opened(directory)
    (directory / "block-00001.json").unlink()
    assert opened(directory).count == 1


def test_a_missing_block_makes_those_after_it_unfinished(directory):
    (directory / "block-00000.json").unlink()
    assert opened(directory).count == 0
    assert not list(directory.glob("block-*.json"))


@pytest.mark.parametrize("name", ["journal.json", "block-00000.json"])
def test_a_truncated_description_is_named(directory, name):
    file = directory / name
    file.write_text(file.read_text()[:-9])
    with pytest.raises(CheckpointError, match=f"{name} is damaged.*--fresh"):
        opened(directory)


def test_half_written_files_are_cleared_away(directory):
    (directory / "block-00002.safetensors.partial").write_bytes(b"half")
    assert opened(directory).count == 2
    assert not list(directory.glob("*.partial"))


def test_a_full_disk_keeps_what_is_finished(directory, monkeypatch):
    journal = opened(directory)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    journal.append(tensors(2), {"path": "layers.2"})
    with pytest.raises(ResourceError, match="the disk is full. Finished blocks are kept: run the same command again"):
        journal.append(tensors(2), {"path": "layers.2"})
    journal.close()
    monkeypatch.undo()
    assert opened(directory).count == 2


def test_a_block_being_written_is_whole_once_the_journal_is_closed(directory, monkeypatch):
    journal, written, looked = opened(directory), files.save_file, threading.Event()

    def slow(*arguments):
        assert looked.wait(60), "nobody looked"
        written(*arguments)

    monkeypatch.setattr(files, "save_file", slow)
    journal.append(tensors(2), {"path": "layers.2"})
    assert journal.count == 2
    looked.set()
    journal.close()
    assert opened(directory).count == 3


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="Choose another --output"):
        opened(tmp_path / "file" / "journal")


def test_streams_of_blocks_that_are_not_finished_are_not_used(directory):
    journal = opened(directory)
    journal.keep_streams(2, {"quantized.0": torch.full((2,), 2.0)}, block_seconds=1e9)
    assert journal.streams()[0] == 2
    journal.close()
    (directory / "block-00001.json").unlink()
    assert opened(directory).streams() is None


def test_streams_are_not_stored_where_computing_them_again_is_quicker(directory):
    journal = opened(directory)
    journal.append(tensors(2), {"path": "layers.2"})
    journal.keep_streams(3, {"quantized.0": torch.zeros(2)}, block_seconds=0.0)
    assert journal.streams() is None


def test_the_log_is_one_object_a_line(directory):
    journal = opened(directory)
    journal.log({"event": "start"})
    journal.log({"event": "end", "seconds": 1.5})
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "end"]
