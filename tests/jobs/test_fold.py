"""`fold`: an equal plain model on disk, what is said of it, and `quantize --transform folded` on top of it."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import TEXT, byte_tokenizer, save_tiny, tiny_model
from transformers import AutoModelForCausalLM, GPT2Config

import pairquant
from pairquant.checkpoint.headers import StoredTensors
from pairquant.checkpoint.read import Checkpoint, ModelFiles
from pairquant.checkpoint.source import SourceWeights
from pairquant.jobs.fold import Silent, fitting, fold
from pairquant.jobs.folded import is_there
from pairquant.jobs.quantize import Silent as SilentQuantize
from pairquant.models.folding import Foldable
from pairquant.models.names import OWN
from pairquant.spec.recipe import PRESETS, recipe_with
from pairquant.support.errors import ConfigError

CONFIG = pairquant.QuantConfig(
    preset="quick", group_size=32, rotations=4, samples=4, seq_len=32, calibration=(str(TEXT),)
)
FOLDED = replace(CONFIG, transform="folded")
TOKENS = torch.arange(3, 131).view(2, 64)


class Heard(Silent):
    def __init__(self):
        self.notices = []

    def notice(self, text):
        self.notices.append(text)


class HeardQuantizing(SilentQuantize):
    def __init__(self, stop=False):
        self.notices, self.stop = [], stop

    def notice(self, text):
        self.notices.append(text)

    def block(self, result):
        if self.stop:
            raise KeyboardInterrupt


@torch.no_grad()
def logits(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(TOKENS, use_cache=False).logits


def difference(one, other):
    a, b = logits(one), logits(other)
    return float((a - b).norm() / a.norm())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tied"), "qwen3")


def test_the_folded_model_computes_the_same_from_other_weights(source, tmp_path):
    summary = fold(source, tmp_path / "out", CONFIG, device="cpu")
    assert difference(source, tmp_path / "out") < 1e-4
    assert summary.rotated
    assert (summary.norms, summary.pairs, summary.untied) == (4, 4, 0)
    assert summary.errors[1] < summary.errors[0]
    before, after = StoredTensors.of_directory(source), StoredTensors.of_directory(tmp_path / "out")
    assert before.fields == after.fields
    changed = [name for name in before.fields if not torch.equal(before.load(name), after.load(name))]
    assert set(changed) == set(before.fields) - {"model.norm.weight"}  # which was 1 everywhere
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((source / "config.json").read_text())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_shared_output_embedding_is_parted_and_its_size_told(tied, tmp_path):
    heard = Heard()
    summary = fold(tied, tmp_path / "out", CONFIG, device="cpu", progress=heard, untie=True)
    assert summary.untied == 288 * 128 * 4
    assert any("which adds 0.1 MB to the files" in text for text in heard.notices), heard.notices
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in StoredTensors.of_directory(tmp_path / "out").fields
    assert difference(tied, tmp_path / "out") < 1e-4


def test_a_shared_output_embedding_stays_shared_unless_asked(tied, tmp_path):
    heard = Heard()
    summary = fold(tied, tmp_path / "out", CONFIG, device="cpu", progress=heard)
    assert (summary.rotated, summary.norms, summary.untied) == (False, 4, 0)
    assert any("would part them, which adds 0.1 MB" in text for text in heard.notices), heard.notices
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert StoredTensors.of_directory(tmp_path / "out").fields == StoredTensors.of_directory(tied).fields
    assert difference(tied, tmp_path / "out") < 1e-4


def test_a_block_that_normalises_its_output_gets_scales_alone(tmp_path):
    heard = Heard()
    source = save_tiny(tmp_path / "source", "gemma2")
    summary = fold(source, tmp_path / "out", CONFIG, device="cpu", progress=heard)
    assert not summary.rotated
    assert any("normalises what the block adds to the stream" in text for text in heard.notices)
    assert difference(source, tmp_path / "out") < 1e-4
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("tie_word_embeddings", True)


def test_half_precision_is_kept_and_costs_its_rounding(tmp_path):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    fold(source, tmp_path / "out", CONFIG, device="cpu")
    fields = StoredTensors.of_directory(tmp_path / "out").fields
    assert {field.dtype for field in fields.values()} == {torch.bfloat16}
    assert difference(source, tmp_path / "out") < 0.05


def test_a_copied_source_is_folded_under_its_own_names(source, tmp_path, monkeypatch):
    """As a GGUF file is: its weights are written out first."""
    monkeypatch.setattr(SourceWeights, "_holds", lambda self, skeleton: False)
    monkeypatch.setattr(ModelFiles, "stored", lambda self: None)
    opened = SourceWeights.open

    def spilled(files, *arguments, **more):
        found = opened(files, *arguments, **more)
        found.originals = None
        return found

    monkeypatch.setattr(SourceWeights, "open", spilled)
    monkeypatch.setattr(ModelFiles, "require_loadable", lambda self: None)
    monkeypatch.setattr(ModelFiles, "names", lambda self, model: OWN)
    fold(source, tmp_path / "out", CONFIG, device="cpu")
    monkeypatch.undo()
    assert difference(source, tmp_path / "out") < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_transformers_changes_on_loading_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(SourceWeights, "_holds", lambda self, skeleton: False)
    with pytest.raises(ConfigError, match="changes when it loads"):
        fold(source, tmp_path / "out", CONFIG, device="cpu")
    assert not list(tmp_path.iterdir())


def test_norms_with_biases_get_scales_alone(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=288, n_positions=64))
    model.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    summary = fold(tmp_path / "source", tmp_path / "out", CONFIG, device="cpu")
    assert not summary.rotated
    assert summary.norms == 2
    assert difference(tmp_path / "source", tmp_path / "out") < 1e-4


def test_nothing_to_fold_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr("pairquant.jobs.fold.look", lambda *_: Foldable(reason="it is odd"))
    with pytest.raises(
        ConfigError, match=r"nothing can be folded into .*: it is odd\. Quantize it with --transform rotated"
    ):
        fold(source, tmp_path / "out", CONFIG, device="cpu")
    assert not list(tmp_path.iterdir())


def test_an_existing_output_and_the_source_are_safe(source, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        fold(source, tmp_path / "out", CONFIG, device="cpu")
    with pytest.raises(ConfigError, match="the source itself"):
        fold(source, source, CONFIG, device="cpu", overwrite=True)


def test_quantize_folded_stores_nothing_beside_the_layers_and_says_where_it_comes_from(tied, tmp_path):
    summary = pairquant.quantize(tied, tmp_path / "out", FOLDED, device="cpu")
    checkpoint = Checkpoint.open(ModelFiles.find(str(tmp_path / "out")))
    for path in checkpoint.stored.linears():
        packed = checkpoint.packed(path)
        assert packed.layout.spec.rotations == 0
        assert torch.equal(packed["channel_scales"], torch.ones_like(packed["channel_scales"]))
    provenance = checkpoint.config.provenance
    assert provenance["source"] == str(tied)
    assert provenance["transform"] == "folded"
    folded = provenance["folded"]
    assert (folded["stream"], folded["norms"], folded["pairs"]) == (False, 4, 4)
    assert "would part them" in folded["reason"]
    assert summary.size_before == ModelFiles.find(str(tied)).size_bytes()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    found, expected = logits(tmp_path / "out"), logits(tied)
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).mean() > 0.9


def test_a_stopped_run_goes_on_with_the_folded_model(source, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pairquant.quantize(source, tmp_path / "out", FOLDED, device="cpu", progress=HeardQuantizing(stop=True))
    assert (tmp_path / ".out.folded" / "config.json").is_file()
    heard = HeardQuantizing()
    pairquant.quantize(source, tmp_path / "out", FOLDED, device="cpu", progress=heard)
    assert "continuing with the model that an earlier run folded" in heard.notices
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_model_that_was_folded_on_another_text_is_not_taken(source, tmp_path):
    """The file is the same, by its name and the options; what it says is not."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text())
    config = replace(FOLDED, calibration=(str(text),))
    pairquant.fold(source, tmp_path / "out", config, device="cpu")
    assert is_there(tmp_path / "out", source, config, "cpu", False, Silent())
    text.write_text(TEXT.read_text()[::-1])
    assert not is_there(tmp_path / "out", source, config, "cpu", False, Silent())


def test_other_options_fold_anew(source, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pairquant.quantize(source, tmp_path / "out", FOLDED, device="cpu", progress=HeardQuantizing(stop=True))
    heard = HeardQuantizing()
    pairquant.quantize(source, tmp_path / "out", replace(FOLDED, rotations=2), device="cpu", fresh=True, progress=heard)
    assert not any("continuing" in text for text in heard.notices)


def test_several_processes_are_refused(source, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="Fold first"):
        pairquant.quantize(source, tmp_path / "out", FOLDED, device="cpu")


def test_folded_helps_a_model_with_outliers_at_few_bits(tmp_path):
    """At 3 bits without activations to correct with: nearest rounding shows what folding is worth."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    recipe = replace(PRESETS["quick"], rounding="nearest", sweeps=0)
    errors = {}
    for transform in ("none", "folded"):
        config = replace(CONFIG, bits=3, recipe=recipe, transform=transform)
        summary = pairquant.quantize(tmp_path / "source", tmp_path / transform, config, device="cpu")
        errors[transform] = sum(summary.errors.values()) / len(summary.errors)
    assert errors["folded"] < 0.7 * errors["none"]


def test_a_size_that_no_choice_has_is_refused_before_folding(source, tmp_path):
    with pytest.raises(ConfigError, match="target"):
        pairquant.quantize(source, tmp_path / "out", replace(FOLDED, target={"bits_per_weight": 1.5}), device="cpu")
    assert not list(tmp_path.iterdir()), "nothing was folded"


def test_an_output_embedding_to_be_trained_later_does_not_hinder_folding():
    recipe = recipe_with("fast", ["head.steps=3"])
    found = fitting(pairquant.QuantConfig(transform="folded", head_bits=4, recipe=recipe))
    assert found.head_bits is None
    assert not found.recipe.head.steps
