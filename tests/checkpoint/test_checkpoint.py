"""Checkpoints on disk: exact round trips, and every damage named."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TEXT, save_tiny
from transformers import AutoModelForCausalLM

import pairquant
from pairquant.checkpoint.headers import StoredTensors
from pairquant.checkpoint.read import Checkpoint, ModelFiles
from pairquant.checkpoint.write import Entry, require_space, write_checkpoint
from pairquant.jobs.inspect import inspect
from pairquant.spec.fields import Field
from pairquant.support.errors import CheckpointError, ConfigError, ResourceError, SourceError

QUICK = pairquant.QuantConfig(
    preset="quick", group_size=32, rotations=2, samples=4, seq_len=32, calibration=(str(TEXT),)
)
PATH = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A source and its checkpoint; copied by the tests that damage it."""
    root = tmp_path_factory.mktemp("pristine")
    source = save_tiny(root / "source", "qwen2")  # qwen2 has biases
    pairquant.quantize(source, root / "checkpoint", QUICK)
    return root


@pytest.fixture
def checkpoint(pristine, tmp_path):
    return shutil.copytree(pristine / "checkpoint", tmp_path / "checkpoint")


def change_tensor(directory, name, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{PATH}.{name}"] = change(tensors[f"{PATH}.{name}"])
    save_file({k: v for k, v in tensors.items() if v is not None}, file, metadata={"format": "pt"})


def with_value(index, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


DAMAGES = {
    "missing": ("theta", lambda t: None, r"up_proj\.theta is missing"),
    "wrong dtype": ("scales", lambda t: t.float(), r"up_proj\.scales is float32, must be float16"),
    "wrong shape": (
        "qzeros",
        lambda t: t[:, :-1].contiguous(),
        r"up_proj\.qzeros has shape \[4, 23\], must be \[4, 24\]",
    ),
    "pair out of range": ("pairs", with_value((0, 5), 32), r"up_proj\.pairs has channel 32, outside 0 to 31"),
    "pair used twice": ("pairs", lambda t: with_value((1, 0), t[1, 1])(t), r"up_proj\.pairs uses a channel twice"),
    "scale not finite": ("scales", with_value((0, 0), torch.inf), r"up_proj\.scales has values that are not finite"),
    "angle not finite": ("theta", with_value((0, 0), torch.nan), r"up_proj\.theta has values that are not finite"),
    "channel scale zero": ("channel_scales", with_value((0, 3), 0), r"up_proj\.channel_scales has zeros"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_named_by_both_readers(checkpoint, damage):
    name, change, message = DAMAGES[damage]
    change_tensor(checkpoint, name, change)
    with pytest.raises(CheckpointError, match=message):
        inspect(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_a_truncated_shard_is_named(checkpoint, keep):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read.*truncated"):
        inspect(checkpoint)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("bits", 7, "bits is 7"),
        ("bits", None, "bits is None"),
        ("group_size", 0, "group_size is 0"),
        ("krot", -1, "krot is -1"),
        ("krot", "8", "krot is '8'"),
        ("shared_rotations", 7, "shared_rotations is 7"),
    ],
)
def test_each_bad_entry_of_config_json_is_named(checkpoint, entry, value, message):
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"][entry] = value
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        inspect(checkpoint)


def test_a_checkpoint_with_the_originals_four_keys_is_enough(checkpoint):
    expected = inspect(checkpoint).checkpoint.packed(PATH).tensors
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    keys = ("quant_method", "bits", "group_size", "krot")
    config["quantization_config"] = {key: config["quantization_config"][key] for key in keys}
    file.write_text(json.dumps(config))
    (checkpoint / "pairquant.json").unlink()
    found = inspect(checkpoint)
    assert found.linears[PATH]["error"] is None
    assert all(torch.equal(t, expected[name]) for name, t in found.checkpoint.packed(PATH).tensors.items())


@pytest.mark.parametrize("curve", [[], 0.1, ["0.1"], None, [0.1, None]])
def test_a_record_of_a_training_that_is_none_is_refused(checkpoint, curve):
    file = checkpoint / "pairquant.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"end_to_end_kl": curve}))
    with pytest.raises(CheckpointError, match="end_to_end_kl is .*, no list of numbers"):
        inspect(checkpoint)


def test_files_are_readable_by_whom_the_umask_lets(pristine):
    umask = os.umask(0)
    os.umask(umask)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (pristine / "checkpoint").iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)


def test_biases_and_plain_layers_stay_as_they_were(pristine):
    source = load_file(pristine / "source" / "model.safetensors")
    stored = load_file(pristine / "checkpoint" / "model.safetensors")
    for name, tensor in source.items():
        if name.removesuffix(".weight") + ".qweight" not in stored:
            torch.testing.assert_close(stored[name].float(), tensor, rtol=1e-3, atol=1e-4)  # biases are stored in fp16
        else:
            assert name not in stored
    assert torch.equal(stored["model.embed_tokens.weight"], source["model.embed_tokens.weight"])


def test_unknown_linear_gets_a_suggestion(pristine):
    opened = Checkpoint.open(ModelFiles.find(str(pristine / "checkpoint")))
    with pytest.raises(CheckpointError, match=r"did you mean 'model\.layers\.0\.mlp\.up_proj'"):
        opened.packed("model.layers.0.mlp.upproj")


def test_a_plain_model_is_no_checkpoint(pristine):
    with pytest.raises(CheckpointError, match="not quantized with pairwise rotations"):
        inspect(pristine / "source")


def test_an_existing_output_is_kept_unless_overwrite_is_asked_for(pristine, tmp_path):
    target = shutil.copytree(pristine / "checkpoint", tmp_path / "out")
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"exists.*--overwrite"):
        pairquant.quantize(pristine / "source", target, QUICK)
    assert (target / "model.safetensors").read_bytes() == before
    rtn = pairquant.QuantConfig(preset="rtn", group_size=32)
    pairquant.quantize(pristine / "source", target, rtn, overwrite=True)
    assert inspect(target).checkpoint.config.spec.rotations == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_directory_that_is_no_model_is_never_overwritten(pristine, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not a model directory"):
        pairquant.quantize(pristine / "source", tmp_path / "thesis", QUICK, overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"


def test_too_little_disk_is_refused_before_work(tmp_path):
    with pytest.raises(ResourceError, match="GB free"):
        require_space(tmp_path / "not" / "yet" / "there", 10**18)


FILL_THE_DISK = """
import resource, signal, sys
import pairquant
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
config = pairquant.QuantConfig(preset="rtn", group_size=32)
import transformers.quantizers.auto
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # every write past 100 kB fails, as on a full disk
try:
    pairquant.quantize(sys.argv[1], sys.argv[2], config, overwrite=True)
except pairquant.PairQuantError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a Unix feature")
@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_fills_while_writing_leaves_the_output_as_it_was_and_the_work_done(pristine, tmp_path, existing):
    target = tmp_path / "out"
    if existing:
        shutil.copytree(pristine / "checkpoint", target)
    before = {f.name: f.read_bytes() for f in target.iterdir()} if existing else None
    done = subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, pristine / "source", target], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "ResourceError: writing" in done.stderr
    assert "the disk is full" in done.stderr
    after = {f.name: f.read_bytes() for f in target.iterdir()} if existing else None
    assert before == after
    assert {path.name for path in tmp_path.iterdir()} == {".out.journal", *(["out"] if existing else [])}
    assert "run the same command again" in done.stderr
    config = pairquant.QuantConfig(preset="rtn", group_size=32)
    pairquant.quantize(pristine / "source", target, config, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILL_WHILE_WRITING = """
import os, signal, sys
import pairquant
from pairquant.jobs import outcome
# The model's files are written by then, the rename into place has not happened.
outcome.copy_log = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
pairquant.quantize(sys.argv[1], sys.argv[2], pairquant.QuantConfig(preset="rtn", group_size=32), overwrite=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a Unix feature")
def test_a_process_killed_while_writing_leaves_the_old_output_whole(pristine, tmp_path):
    target = shutil.copytree(pristine / "checkpoint", tmp_path / "out")
    before = {f.name: f.read_bytes() for f in target.iterdir()}
    done = subprocess.run([sys.executable, "-c", KILL_WHILE_WRITING, pristine / "source", target], check=False)
    assert done.returncode == -9
    assert {f.name: f.read_bytes() for f in target.iterdir()} == before


def test_an_interrupted_write_removes_its_staging_directory(tmp_path):
    def interrupted(directory):
        (directory / "half.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "out", {}, interrupted, {})
    assert os.listdir(tmp_path) == []


def test_what_killed_writers_left_is_put_right(tmp_path):
    """Killed between the two renames of an overwritten output, and before the first."""
    (tmp_path / ".out.retired").mkdir()
    (tmp_path / ".out.retired" / "config.json").write_text("{}")
    (tmp_path / ".out.abc.partial").mkdir()
    write_checkpoint(tmp_path / "out", {}, lambda directory: None, {}, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert not (tmp_path / "out" / "config.json").exists()


def test_large_checkpoints_are_cut_into_shards_that_load_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr("pairquant.checkpoint.write.SHARD_BYTES", 300)
    values = {f"t{i}": torch.arange(20 + i, dtype=torch.float32) for i in range(9)}
    entries = {
        name: Entry(Field(value.dtype, tuple(value.shape)), lambda value=value: value) for name, value in values.items()
    }
    write_checkpoint(tmp_path / "out", entries, lambda directory: None, {})
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = StoredTensors.of_directory(tmp_path / "out")
    assert len(set(index["weight_map"].values())) == 4
    assert {name: stored.files[name].name for name in stored.fields} == index["weight_map"]
    assert all(torch.equal(stored.load(name), value) for name, value in values.items())


class TestSources:
    def test_missing_directory_with_suggestion(self, pristine):
        with pytest.raises(SourceError, match="did you mean .*source"):
            ModelFiles.find(str(pristine / "sorce"))

    def test_missing_gguf_with_suggestion(self, tmp_path):
        (tmp_path / "model.gguf").write_bytes(b"")
        with pytest.raises(SourceError, match="did you mean .*model.gguf"):
            ModelFiles.find(str(tmp_path / "modell.gguf"))

    def test_a_directory_without_config(self, tmp_path):
        with pytest.raises(SourceError, match=r"no config\.json"):
            ModelFiles.find(str(tmp_path))

    def test_a_hub_name_that_cannot_be_reached(self):
        with pytest.raises(SourceError, match="cannot be fetched from the hub"):
            ModelFiles.find("somebody/no-such-model")

    def test_a_damaged_gguf(self, tmp_path):
        (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
        with pytest.raises(SourceError, match="cannot be loaded"):
            ModelFiles.find(str(tmp_path / "broken.gguf")).tokenizer()

    def test_a_missing_tokenizer(self, pristine, tmp_path):
        source = shutil.copytree(pristine / "source", tmp_path / "source")
        for file in source.glob("*token*"):
            file.unlink()
        with pytest.raises(SourceError, match="tokenizer"):
            pairquant.quantize(source, tmp_path / "out", QUICK)

    def test_a_truncated_source(self, pristine, tmp_path):
        source = shutil.copytree(pristine / "source", tmp_path / "source")
        file = source / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(SourceError, match="weights of .* cannot be loaded"):
            pairquant.quantize(source, tmp_path / "out", QUICK)
        assert not (tmp_path / "out").exists()
