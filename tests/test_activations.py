"""Models whose activations are rounded, from end to end: fitted, stored, read, run, and refused where nothing rounds."""

import json
import shutil

import pytest
import torch
from packed import error
from test_families import make_source
from tiny_models import TEXT, save_tiny
from transformers import AutoModelForCausalLM

import pairquant
from pairquant.checkpoint.read import Checkpoint, ModelFiles
from pairquant.core.linear import decode
from pairquant.hub.card import _facts
from pairquant.jobs.compare import compare
from pairquant.jobs.inspect import backends, simulated
from pairquant.jobs.quantize import Silent
from pairquant.kernels.run.cpu_int8 import products_are_exact
from pairquant.models.blocks import find_blocks
from pairquant.models.planning import plan_model
from pairquant.models.rounded_inputs import round_inputs, roundings_of
from pairquant.optimize.walk import Walk
from pairquant.report.facts import gather
from pairquant.report.page import _cards, _comparison_table
from pairquant.support.errors import CheckpointError, ConfigError

OPTIONS = {"group_size": 32, "rotations": 2, "samples": 2, "seq_len": 64, "calibration": (str(TEXT),)}
TOKENS = torch.arange(3, 67)[None] * 5 % 250


class Heard(Silent):
    def __init__(self):
        self.notices = []

    def notice(self, text):
        self.notices.append(text)


def config_of(preset="quick", **options):
    return pairquant.QuantConfig(**{"preset": preset, **OPTIONS, **options})


def walked(directory, config):
    """The model of a directory, quantized in memory."""
    files = ModelFiles.find(str(directory))
    model, tokenizer = files.model(torch.float32), files.tokenizer()
    tokens = pairquant.optimize.calibration.calibrate(tokenizer, config.calibration, 2, 64, 0).tokens
    plan, blocks = plan_model(model, config)
    for _ in Walk(model, blocks, plan, config, torch.device("cpu"), tokens).run():
        pass
    return model


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    root = tmp_path_factory.mktemp("activations")
    save_tiny(root / "source")
    return root


@pytest.fixture(scope="module")
def made(dense):
    heard = Heard()
    summary = pairquant.quantize(
        dense / "source", dense / "int8", config_of(activations="int8"), device="cpu", progress=heard
    )
    return dense, summary, heard.notices


def test_the_checkpoint_says_what_is_rounded(made):
    root, _, notices = made
    entries = json.loads((root / "int8" / "config.json").read_text())["quantization_config"]
    assert entries["activations"] == "int8"
    checkpoint = Checkpoint.open(ModelFiles.find(str(root / "int8")))
    assert checkpoint.specs() == ["4 bits, groups of 32, 2 rotations, int8 activations"]
    how = "multiplied as such by cpu-int8" if products_are_exact() else "simulated on this machine"
    assert any(f"read is rounded to int8, {how}" in text for text in notices)


def test_the_stored_model_answers_as_the_one_that_was_fitted(made):
    root, _, _ = made
    fitted = walked(root / "source", config_of(activations="int8"))
    stored = AutoModelForCausalLM.from_pretrained(root / "int8", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(root / "int8", dtype=torch.float32).dequantize()
    with torch.no_grad():
        answers = [model(TOKENS).logits for model in (fitted, stored, plain)]
    assert error(answers[1], answers[0]) < 0.5 * error(answers[1], answers[2])


def test_tables_say_that_the_format_is_simulated(made):
    root, _, _ = made
    assert simulated(root / "int8", "cpu", "bfloat16") == (None if products_are_exact() else "int8")
    assert simulated(root / "source", "cpu") is None
    labels = {row.explanation.label for row in backends(root / "int8", "cpu", "float32")}
    assert labels == {"decoded (int8 activations simulated)"}


def test_evaluations_reports_and_model_cards_name_the_format(made, tmp_path):
    root, _, _ = made
    text = tmp_path / "short.txt"
    text.write_text(TEXT.read_text()[:2000])
    found = compare(root / "source", [root / "int8"], [str(text)], seq_len=64, device="cpu")
    assert [row["evaluation"]["activations"] for row in found["rows"]] == ["not rounded", "int8"]
    results = tmp_path / "found.json"
    results.write_text(json.dumps(found))
    facts = gather([root / "int8"], [results])
    assert [card.value for card in _cards(facts.checkpoints[0]) if card.label == "activations"] == ["int8"]
    table = _comparison_table(facts, [name for name in facts.models if name != "int8"])
    place = table.columns.index("activations")
    assert [row[place].text for row in table.rows] == ["int8", "not rounded"]
    assert all(len(row) == len(table.columns) for row in table.rows)
    found["rows"][1]["evaluation"]["activations"] = None
    results.write_text(json.dumps(found))
    plain = gather([], [results])
    table = _comparison_table(plain, list(plain.models))
    assert "activations" not in table.columns
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert _facts(facts.checkpoints[0].checkpoint)["activations"].startswith("int8: ")


def test_a_config_that_names_no_format_is_refused(made, tmp_path):
    root, _, _ = made
    config = root / "int8" / "config.json"
    text = config.read_text()
    try:
        config.write_text(text.replace('"int8"', '"int9"'))
        with pytest.raises(CheckpointError, match="activations is 'int9', must be one of int8"):
            Checkpoint.open(ModelFiles.find(str(root / "int8")))
    finally:
        config.write_text(text)


@pytest.mark.parametrize("to", ["bf16", "awq"])
@pytest.mark.parametrize("some", [False, True], ids=["all layers", "some layers"])
def test_no_other_format_says_that_activations_are_rounded(made, tmp_path, to, some):
    root, _, _ = made
    source = tmp_path / "source"
    shutil.copytree(root / "int8", source)
    if some:  # as a checkpoint may say it that another program wrote
        config = json.loads((source / "config.json").read_text())
        del config["quantization_config"]["activations"]
        config["quantization_config"]["dynamic"] = {r"+:.*\.down_proj$": {"activations": "int8"}}
        (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="round what they read to int8, .* Quantize without --activations"):
        pairquant.export(source, tmp_path / "out", to)


def test_the_papers_preset_says_that_it_fits_linears_in_turn(dense, tmp_path):
    heard, recipe = Heard(), pairquant.spec.recipe.recipe_with("paper", ["steps=2"])
    config = config_of("paper", recipe=recipe, activations="int4")
    pairquant.quantize(dense / "source", tmp_path / "out", config, device="cpu", progress=heard)
    assert any("settings of training have no effect" in text for text in heard.notices)


@pytest.mark.parametrize(
    ("preset", "activations"), [("best", "mxfp4"), ("paper", "fp8"), ("gptq", "int4"), ("rtn", "int8")]
)
def test_every_kind_of_recipe_rounds_activations(dense, preset, activations):
    changes = {"best": ["steps=4", "refit.epochs=1"], "paper": ["steps=4"]}.get(preset, [])
    recipe = pairquant.spec.recipe.recipe_with(preset, changes)
    model = walked(dense / "source", config_of(preset, recipe=recipe, activations=activations))
    original = ModelFiles.find(str(dense / "source")).model(torch.float32)
    with torch.no_grad():
        assert 0 < error(model(TOKENS).logits, original(TOKENS).logits) < 1.0


def test_packed_experts_round_what_they_read_as_the_walk_does(tmp_path):
    source = make_source("Mixtral", tmp_path / "source")
    pairquant.quantize(source, tmp_path / "out", config_of(activations="int8"), device="cpu")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    checkpoint = Checkpoint.open(ModelFiles.find(str(tmp_path / "out")))
    blocks = find_blocks(plain, names=ModelFiles.find(str(source)).names(plain))
    everything = {path: checkpoint.packed(path) for block in blocks for path in block.sites}
    with torch.no_grad():
        for block in blocks:
            for path, site in block.sites.items():
                site.put(decode(everything[path]))
        wanted, without = stored(TOKENS).logits, plain(TOKENS).logits
        for block in blocks:
            packed = {path: everything[path] for path in block.sites}
            round_inputs(block.sites, roundings_of(block.sites, packed, torch.device("cpu")))
        assert error(plain(TOKENS).logits, wanted) < 0.2 * error(without, wanted)
