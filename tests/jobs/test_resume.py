"""A run that was stopped, however, goes on where it was, and ends with the bytes of one that was not."""

import json
import random
import sys

import pytest
import torch
from killing import RECIPES, config, content, run_killing, save_source

import pairquant
from pairquant.checkpoint.read import Checkpoint, ModelFiles
from pairquant.support.errors import CheckpointError, ConfigError, SourceError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a Unix feature")


class Stop(Exception):
    pass


class StopAfter:
    """Progress that ends the run once so many blocks are finished."""

    def __init__(self, blocks):
        self.blocks, self.finished = blocks, None

    def stage(self, text): ...
    def notice(self, text): ...

    def plan(self, blocks, linears, finished, memory):
        self.finished = finished

    def block(self, result):
        if result.index + 1 == self.blocks:
            raise Stop

    def trained(self, epoch, epochs, divergence):
        self.epochs = [*getattr(self, "epochs", []), epoch]
        if self.blocks == "training" and epoch == 1:
            raise Stop


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """Preset → the directory of an uninterrupted run."""
    root = tmp_path_factory.mktemp("whole")
    for preset in RECIPES:
        pairquant.quantize(source, root / preset, config(preset), device="cpu")
    return root


def stop(source, output, blocks, preset="fast"):
    with pytest.raises(Stop):
        pairquant.quantize(source, output, config(preset), device="cpu", progress=StopAfter(blocks))


@pytest.mark.parametrize("preset", RECIPES)
def test_a_stopped_run_continues_to_the_same_bytes(source, whole, tmp_path, preset):
    stop(source, tmp_path / "out", 2, preset)
    assert not (tmp_path / "out").exists()
    progress = StopAfter(None)
    pairquant.quantize(source, tmp_path / "out", config(preset), device="cpu", progress=progress)
    assert progress.finished == 2
    assert content(tmp_path / "out") == content(whole / preset)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    events = [json.loads(line)["event"] for line in (tmp_path / "out" / "pairquant.jsonl").read_text().splitlines()]
    assert (events.count("end_to_end") == 3) == (preset == "fast+end")  # the start and two epochs
    assert [event for event in events if event not in ("end_to_end", "notice")] == [
        "start",
        "block",
        "block",
        "start",
        "block",
        "block",
        "block",
        "end",
    ]


def test_streams_computed_again_and_streams_stored_give_the_same_bytes(source, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("pairquant.checkpoint.journal.SNAPSHOT_SHARE", 1e9)
    stop(source, tmp_path / "stored", 3)
    assert list((tmp_path / ".stored.journal").glob("streams-*"))
    monkeypatch.setattr("pairquant.checkpoint.journal.SNAPSHOT_SHARE", 0)
    stop(source, tmp_path / "again", 3)
    assert not list((tmp_path / ".again.journal").glob("streams-*"))
    for name in ("stored", "again"):
        pairquant.quantize(source, tmp_path / name, config("fast"), device="cpu")
        assert content(tmp_path / name) == content(whole / "fast")


def test_killed_at_random_moments(source, whole, tmp_path):
    killed = run_killing(source, tmp_path / "q", "fast", 6, random.Random(1), 3.0)
    assert killed > 0
    assert content(tmp_path / "q") == content(whole / "fast")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_other_arguments_are_refused_and_fresh_starts_over(source, tmp_path):
    stop(source, tmp_path / "out", 2)
    with pytest.raises(ConfigError, match=r"config\.preset: fast then, rtn now"):
        pairquant.quantize(source, tmp_path / "out", pairquant.QuantConfig(preset="rtn", group_size=64), device="cpu")
    progress = StopAfter(None)
    pairquant.quantize(source, tmp_path / "out", config("fast"), device="cpu", progress=progress, fresh=True)
    assert progress.finished == 0


def test_another_source_is_refused(source, tmp_path):
    copy = save_source(tmp_path / "source")
    stop(copy, tmp_path / "out", 1)
    torch.manual_seed(1)
    weights = copy / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(ConfigError, match="source: "):
        pairquant.quantize(copy, tmp_path / "out", config("fast"), device="cpu")


def test_a_source_that_changes_under_the_run_is_named(source, tmp_path):
    copy = save_source(tmp_path / "source")

    class Meddle(StopAfter):
        def block(self, result):
            (copy / "model.safetensors").touch()

    with pytest.raises(SourceError, match="changed while it was being quantized. Finished blocks are kept"):
        pairquant.quantize(copy, tmp_path / "out", config("fast"), device="cpu", progress=Meddle(None))
    assert (tmp_path / ".out.journal" / "block-00000.json").exists()


def test_a_truncated_block_is_refused_and_the_others_are_kept(source, whole, tmp_path):
    stop(source, tmp_path / "out", 3)
    damaged = tmp_path / ".out.journal" / "block-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="Delete block-00002.json"):
        pairquant.quantize(source, tmp_path / "out", config("fast"), device="cpu")
    damaged.with_suffix(".json").unlink()
    progress = StopAfter(None)
    pairquant.quantize(source, tmp_path / "out", config("fast"), device="cpu", progress=progress)
    assert progress.finished == 2
    assert content(tmp_path / "out") == content(whole / "fast")


def test_a_training_of_the_whole_model_that_was_stopped_is_done_again(source, whole, tmp_path):
    stop(source, tmp_path / "out", "training", "fast+end")
    progress = StopAfter(None)
    pairquant.quantize(source, tmp_path / "out", config("fast+end"), device="cpu", progress=progress)
    assert (progress.finished, progress.epochs) == (5, [0, 1, 2])
    assert content(tmp_path / "out") == content(whole / "fast+end")


@pytest.fixture
def trained(source, tmp_path, monkeypatch):
    """An output whose run was stopped between the training of the whole model and writing the checkpoint."""

    def full(*_):
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr("pairquant.jobs.outcome.write_checkpoint", full)
        with pytest.raises(Stop):
            pairquant.quantize(source, tmp_path / "out", config("fast+end"), device="cpu")
    return tmp_path / "out"


def test_a_training_of_the_whole_model_that_was_finished_is_not_done_again(source, whole, trained):
    progress = StopAfter(None)
    pairquant.quantize(source, trained, config("fast+end"), device="cpu", progress=progress)
    assert not hasattr(progress, "epochs")
    assert content(trained) == content(whole / "fast+end")
    report = json.loads((trained / "pairquant.json").read_text())
    assert len(report["end_to_end_kl"]) == 3
    checkpoint = Checkpoint.open(ModelFiles.find(str(trained)))
    assert checkpoint.trained_whole == (report["end_to_end_kl"][0], min(report["end_to_end_kl"]))
    assert report["end_to_end_kl"] == json.loads((whole / "fast+end" / "pairquant.json").read_text())["end_to_end_kl"]


def test_a_damaged_training_of_the_whole_model_is_refused_and_the_blocks_are_kept(source, whole, trained):
    journal = trained.with_name(".out.journal")
    damaged = journal / "revised-00003.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="Delete revised.json"):
        pairquant.quantize(source, trained, config("fast+end"), device="cpu")
    (journal / "revised.json").unlink()
    progress = StopAfter(None)
    pairquant.quantize(source, trained, config("fast+end"), device="cpu", progress=progress)
    assert (progress.finished, progress.epochs) == (5, [0, 1, 2])
    assert content(trained) == content(whole / "fast+end")
