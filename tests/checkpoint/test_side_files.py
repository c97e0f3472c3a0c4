"""What of a model's directory travels."""

import pytest

from pairquant.checkpoint.side_files import LEFT_BEHIND, copy_side_files, side_files

TRAVEL = (
    "tokenizer.model", "tokenizer.json", "preprocessor_config.json", "LICENSE", "README.md", "modeling_own.py",
    "additional_chat_templates/tools.jinja", "original/params.json", "1_Pooling/config.json", "images/figure.png",
)  # fmt: skip
STAY = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "consolidated.00.pth",
    "model-q4.GGUF", "onnx/model.onnx", "original/consolidated.00.pth", ".gitattributes", ".cache/x.json",
    "__pycache__/modeling_own.pyc", "checkpoint-500/trainer_state.json", "pairquant.json", "pairquant.jsonl",
    "old-output/config.json", "old-output/model.safetensors", "old-output/tokenizer.json",
)  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    for name in (*TRAVEL, *STAY):
        file = tmp_path / "model" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"\x00" + name.encode())
    return tmp_path / "model"


def test_every_file_but_weights_indexes_hidden_ones_and_caches(directory):
    assert {file.as_posix() for file in side_files(directory)} == set(TRAVEL)


def test_copies_have_the_same_bytes_and_no_empty_directories(directory, tmp_path):
    copy_side_files(directory, tmp_path / "copy", without=frozenset({"LICENSE"}))
    copied = {f.relative_to(tmp_path / "copy").as_posix(): f for f in (tmp_path / "copy").rglob("*") if f.is_file()}
    assert set(copied) == set(TRAVEL) - {"LICENSE"}
    assert all(file.read_bytes() == (directory / name).read_bytes() for name, file in copied.items())
    assert all(any(d.iterdir()) for d in (tmp_path / "copy").rglob("*") if d.is_dir())


def test_links_to_files_are_followed_as_hub_caches_are_made_of_them(directory, tmp_path):
    (tmp_path / "blob").write_text("linked")
    (directory / "NOTICE").symlink_to(tmp_path / "blob")
    copy_side_files(directory, tmp_path / "copy")
    assert not (tmp_path / "copy" / "NOTICE").is_symlink()
    assert (tmp_path / "copy" / "NOTICE").read_text() == "linked"


def test_every_reason_has_names():
    assert all(patterns for patterns in LEFT_BEHIND.values())
