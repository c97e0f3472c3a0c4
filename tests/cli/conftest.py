"""A directory of models and texts, and what `pairquant quantize` makes of one: once for the tests of all commands."""

import json

import pytest
from shell import pairquant
from tiny_models import byte_tokenizer, save_tiny


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    save_tiny(root / "source")
    (root / "custom").mkdir()
    custom = {"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig"}}
    (root / "custom" / "config.json").write_text(json.dumps(custom))
    byte_tokenizer().save_pretrained(root / "custom")
    (root / "notes.txt").write_text("all work and no play makes jack a dull boy. " * 60)
    return root


@pytest.fixture(scope="session")
def quantized(workplace):
    return pairquant(
        workplace, "quantize", "source", "--output", "out", "--preset", "quick", "--group-size", "auto", "--rotations", 2,
        "--samples", 4, "--seq-len", 32, "--calibration", "notes.txt", "--share-rotations", "--ignore", "o_proj",
        "--device", "cpu", "--seed", 3,
    )  # fmt: skip
