"""Models whose weights are in MXFP4, from end to end: fitted, stored, read, run, shown, and what does not go with it."""

import json
import shutil

import pytest
import torch
from packed import error, random_packed
from test_families import make_source
from tiny_models import TEXT, save_tiny
from transformers import AutoModelForCausalLM

import pairquant
from pairquant.checkpoint.read import Checkpoint, ModelFiles
from pairquant.core.grids import MxGrid, grid_of
from pairquant.core.linear import decode
from pairquant.jobs.inspect import backends, inspect
from pairquant.jobs.quantize import Silent
from pairquant.jobs.trace import trace
from pairquant.layers.embedding import Rows
from pairquant.models.planning import plan_model
from pairquant.optimize.calibration import calibrate
from pairquant.optimize.walk import Walk
from pairquant.spec.linear import Spec
from pairquant.support.errors import CheckpointError, ConfigError

OPTIONS = {"group_size": 64, "rotations": 2, "samples": 2, "seq_len": 64, "calibration": (str(TEXT),)}
TOKENS = torch.arange(3, 67)[None] * 5 % 250


class Heard(Silent):
    def __init__(self):
        self.notices = []

    def notice(self, text):
        self.notices.append(text)


def config_of(preset="quick", **options):
    return pairquant.QuantConfig(**{"preset": preset, "weights": "mxfp4", **OPTIONS, **options})


def walked(directory, config):
    """The model of a directory, quantized in memory, and the relative errors of its layers on the calibration text."""
    files = ModelFiles.find(str(directory))
    model, tokenizer = files.model(torch.float32), files.tokenizer()
    tokens = calibrate(tokenizer, config.calibration, 2, 64, 0).tokens
    plan, blocks = plan_model(model, config)
    walk = Walk(model, blocks, plan, config, torch.device("cpu"), tokens)
    errors = [error for result in walk.run() for error in result.errors.values()]
    return model, torch.tensor(errors)


def opened(directory):
    return Checkpoint.open(ModelFiles.find(str(directory)))


def answer(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("mxfp4") / "source")


@pytest.fixture(scope="module", params=[None, "mxfp4"], ids=["activations in 16 bits", "mxfp4 activations"])
def made(source, request):
    heard, config = Heard(), config_of(activations=request.param)
    output = source.with_name(f"made-{request.param}")
    return pairquant.quantize(source, output, config, device="cpu", progress=heard), config, heard.notices


def test_the_checkpoint_holds_codes_and_powers_of_two(made):
    summary, _, _ = made
    entries = json.loads((summary.output / "config.json").read_text())["quantization_config"]
    assert (entries["bits"], entries["weights"]) == (4, "mxfp4")
    checkpoint = opened(summary.output)
    for path in checkpoint.stored.linears():
        packed = checkpoint.packed(path)
        assert "qzeros" not in packed.tensors
        assert isinstance(grid_of(packed), MxGrid)
    assert len(inspect(summary.output).linears) == len(checkpoint.stored.linears())
    assert checkpoint.specs()[0].startswith("mxfp4 weights, groups of 64, 2 rotations")


def test_the_stored_model_answers_as_the_one_that_was_fitted(source, made):
    summary, config, _ = made
    (fitted, _), original = walked(source, config), AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    stored = AutoModelForCausalLM.from_pretrained(summary.output, dtype=torch.float32)
    assert error(answer(stored), answer(fitted)) < 0.05 * error(answer(stored), answer(original))


def test_users_are_told_that_it_runs_decoded(made):
    summary, _, notices = made
    assert any("of mxfp4 weights run decoded on this machine" in text for text in notices)
    for row in backends(summary.output, "cpu"):
        assert row.explanation.backend == "decoded"
        assert "the layer's weights are mxfp4" in row.explanation.refusals["cpu-int4"]
    name = next(iter(opened(summary.output).stored.linears()))
    steps, _ = trace(summary.output, name)
    assert any(step.tensor == "E2M1(q) · s" for step in steps)


def test_it_is_exported_as_what_it_stands_for(made, tmp_path):
    summary, config, _ = made
    if config.activations is None:
        pairquant.export(summary.output, tmp_path / "plain", "bf16")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
        stored = AutoModelForCausalLM.from_pretrained(summary.output, dtype=torch.float32)
        assert error(answer(plain), answer(stored)) < 0.02
    with pytest.raises(ConfigError):
        pairquant.export(summary.output, tmp_path / "awq", "awq")


def test_each_step_of_the_fit_is_worth_it(source):
    """Round to nearest, GPTQ, and with transforms, the search of scales and refinement."""
    assert config_of("rtn").spec == Spec(4, 64, 0, weights="mxfp4")
    losses = [walked(source, config_of(preset))[1].mean() for preset in ("rtn", "gptq", "fast")]
    assert losses[1] < 0.8 * losses[0]
    assert losses[2] < 0.8 * losses[1]


@pytest.mark.parametrize(
    ("preset", "settings"), [("best", ["steps=4", "refit.epochs=1"]), ("paper", ["steps=4"]), ("fast", ["steps=4"])]
)
def test_every_kind_of_recipe_and_a_last_training_round_to_it(source, tmp_path, preset, settings):
    heard, recipe = Heard(), pairquant.spec.recipe.recipe_with(preset, settings, end_to_end=1)
    pairquant.quantize(source, tmp_path / "out", config_of(preset, recipe=recipe), device="cpu", progress=heard)
    checkpoint = opened(tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for path in checkpoint.stored.linears():
        weight = original.get_parameter(f"{path}.weight").detach()
        assert error(decode(checkpoint.packed(path)), weight) < 0.4  # other weights than the original's are 1.4 away
    assert (preset == "paper") == any(
        "with mxfp4 weights this preset fits one linear" in text for text in heard.notices
    )


def test_some_layers_and_embeddings_may_have_whole_numbers(source, tmp_path):
    config = config_of("rtn", overrides=("down_proj=bits:8", "o_proj=bits:4"), head_bits=8, embedding_bits=4)
    pairquant.quantize(source, tmp_path / "out", config, device="cpu")
    checkpoint = opened(tmp_path / "out")
    kinds = {path.rpartition(".")[2]: checkpoint.layout(path) for path in checkpoint.stored.linears()}
    found = {name: (layout.bits, layout.weights) for name, layout in kinds.items()}
    assert found == dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), (4, "mxfp4")) | {
        "down_proj": (8, None), "o_proj": (4, None), "lm_head": (8, None), "embed_tokens": (4, None),
    }  # fmt: skip
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(TOKENS)


def test_rows_that_are_looked_up_must_be_whole_numbers():
    with pytest.raises(CheckpointError, match="input embedding's codes are mxfp4, must be whole numbers"):
        Rows.of(random_packed(64, 128, 64, weights="mxfp4"))


def test_experts_run_decoded(tmp_path):
    source = make_source("Mixtral", tmp_path / "source")
    pairquant.quantize(source, tmp_path / "out", config_of("rtn", group_size=32), device="cpu")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    pairquant.export(tmp_path / "out", tmp_path / "plain", "bf16")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert error(answer(stored), answer(plain)) < 0.02
    assert {row.explanation.backend for row in backends(tmp_path / "out", "cpu")} == {"decoded"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits is 3, but weights is 'mxfp4'"),
        ({"symmetric": True}, "symmetric is True, but weights is 'mxfp4'"),
        ({"rotations": "auto"}, "rotations is 'auto', but weights is 'mxfp4'"),
        ({"target": {"bits_per_weight": 4.0}}, "a target size is given, but weights is 'mxfp4'"),
        ({"weights": "mxfp6"}, "weights is 'mxfp6', allowed: mxfp4"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        config_of(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize("form", ["awq", "gguf", "compressed-tensors"])
def test_formats_of_other_programs_are_refused_before_the_work(source, tmp_path, form):
    with pytest.raises(ConfigError, match=f"weights is 'mxfp4', and {form} holds whole numbers. Leave --weights out"):
        pairquant.quantize_as(form, source, tmp_path / ("out.gguf" if form == "gguf" else "out"), config_of())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda entries: entries.pop("weights"), "scales is I32, must be F16|qzeros is missing"),
        (lambda entries: entries.update(weights="mxfp6"), "weights is 'mxfp6', must be mxfp4, or null"),
        (lambda entries: entries.update(bits=3), "bits of mxfp4 weights is 3, allowed: 4"),
    ],
    ids=["unknown to the reader", "another format", "contradicting"],
)
def test_a_reader_that_is_told_otherwise_refuses(made, tmp_path, damage, message):
    summary, _, _ = made
    shutil.copytree(summary.output, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    damage(config["quantization_config"])
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        inspect(tmp_path / "out")
