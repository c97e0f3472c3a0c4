"""Tiny checkpoints to report on, quantized once for all tests here."""

import json

import pytest
from models import TEXT, save_tiny

import pairquant
from pairquant.config import recipe_with

BASE = {"group_size": 32, "rotations": 2, "samples": 4, "seq_len": 32, "calibration": (str(TEXT),)}


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("report") / "source")


@pytest.fixture(scope="session")
def quick(source):
    """Without block-wise training."""
    output = source.parent / "quick"
    pairquant.quantize(source, output, pairquant.QuantConfig(preset="quick", **BASE), device="cpu")
    return output


@pytest.fixture(scope="session")
def trained(source):
    """By the paper's recipe, two epochs a stage, of whose losses the log tells."""
    output = source.parent / "trained"
    recipe = recipe_with(
        "paper", ["training.epochs=2", "training.weight_epochs=2", "training.validation_samples=2", "training.batch=4"]
    )
    config = pairquant.QuantConfig(preset="paper", recipe=recipe, **BASE)
    pairquant.quantize(source, output, config, device="cpu")
    return output


@pytest.fixture
def results(tmp_path):
    """Writes a file as `pairquant eval --json` does: of a model, its bits per weight, and texts with some measures."""

    def write(name, model, bits, texts, **more):
        blank = {"tokens": 630, "perplexity": 20.0, "kl": None, "top1": None}
        rows = {text: blank | row for text, row in texts.items()}
        (tmp_path / name).write_text(json.dumps({"model": str(model), "texts": rows, "bits_per_weight": bits, **more}))
        return tmp_path / name

    return write
