"""Tiny checkpoints to report on, quantized once for all tests here."""

import json

import pytest
from tiny_models import TEXT, save_tiny

import pairquant
from pairquant.spec.recipe import recipe_with

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
    """By the paper's recipe, two epochs a stage, of whose losses the log tells, and then one of the whole model."""
    output = source.parent / "trained"
    recipe = recipe_with(
        "paper",
        ["training.epochs=2", "training.weight_epochs=2", "training.validation_samples=2", "training.batch=4"],
        end_to_end=1,
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


@pytest.fixture
def write_json(tmp_path):
    def write(name, content):
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def evaluated():
    """What `pairquant eval --json` writes of a model beside its original, all parts asked for."""

    def make(model, reference, kl=0.1, bits=4.0):
        parts = [{"start": 0, "end": 10, "kl": 0.1}, {"start": 10, "end": 30, "kl": 0.3}]
        text = {"tokens": 630, "perplexity": 20.0, "kl": kl, "top1": 0.9, "kl_interval": [kl / 2, 2 * kl]}
        plain = {"tokens": 630, "perplexity": 20.0, "kl": None, "top1": None, "kl_interval": None}
        answers = {
            "problems": 40, "correct": 20, "accuracy": 0.5, "interval": [0.3, 0.7], "finished": 1.0, "tokens": 9.0,
            "outcomes": [True, False] * 20,
        }  # fmt: skip
        pair = {"lost": 7, "gained": 3, "difference": -0.1, "interval": None, "p_value": 0.3, "no_worse": 0.2}
        metric = {"value": 0.5, "stderr": 0.1, "outcomes": [True, False]}
        words = {"value": 3.0, "stderr": None, "outcomes": None}
        task = {"small": {"acc": metric, "word_perplexity": words}}
        original = {"small": {"acc": metric | {"value": 0.55}, "word_perplexity": words}}
        found = {
            "model": str(model),
            "reference": reference,
            "bits_per_weight": bits,
            "device": "a CPU",
            "texts": {"wiki.txt": text | {"kl_by_position": parts} if reference else plain},
            "answers": {"/data/sums.jsonl": {"model": answers, "reference": None, "paired": None}},
            "tasks": {"model": task, "reference": None, "paired": None},
        }
        if reference:
            found["answers"]["/data/sums.jsonl"] |= {"reference": answers | {"accuracy": 0.6}, "paired": pair}
            found["tasks"] |= {"reference": original, "paired": {"small": {"acc": pair}}}
            found["chains"] = {
                "chains": 4, "tokens": 90, "kl": 0.2, "kl_interval": [0.1, 0.3], "kl_by_position": parts,
                "kl_of_chains": [0.2] * 4, "tokens_of_chains": [30, 30, 15, 15], "finished": 0.5,
                "departures": [4, 9, None, 4], "departure_median": 9, "never_departed": 0.25,
                "plan": {"count": 4, "tokens": 30},
            }  # fmt: skip
        return found

    return make


def speed_of(name, factor):
    row = {"prefill_tokens_per_s": 100.0, "first_token_s": 0.1}
    rows = [row | {"batch": batch, "decode_tokens_per_s": float(factor * batch)} for batch in (1, 4)]
    return {"name": str(name), "dtype": "bfloat16", "peak_memory_bytes": None, "rows": rows}


@pytest.fixture(scope="session")
def benched():
    """What `pairquant bench --json` writes."""

    def make(model, reference):
        return {
            "model": speed_of(model, 11), "reference": speed_of(reference, 10), "workload": {}, "engine": "transformers",
            "device": "a CPU",
        }  # fmt: skip

    return make


@pytest.fixture(scope="session")
def compared(evaluated):
    """What `pairquant compare --json` writes: the further down, the further from the original, and the faster."""

    def make(original, *models):
        rows = [
            {
                "name": str(name), "size_bytes": 100 if place else 300, "quantized_in_s": 7.0 if place else None,
                "evaluation": evaluated(name, original if place else None, 0.1 * place, 4.0 if place else 16.0),
                "speed": speed_of(name, 10 + place),
            }
            for place, name in enumerate((original, *models))
        ]  # fmt: skip
        return {"rows": rows, "closest": {}}

    return make
