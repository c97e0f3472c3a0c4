"""The output embedding quantized: fitted on what it reads, stored apart from the input embedding, run, resumed, refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from killing import content
from safetensors.torch import load_file
from test_families import make_source
from tiny_models import FAMILIES, SIZES, TEXT, byte_tokenizer, tiny_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import pairquant
from pairquant.checkpoint.read import Checkpoint, ModelFiles
from pairquant.core.linear import decode
from pairquant.evaluation.quality import measure
from pairquant.jobs.quantize import Silent
from pairquant.layers.linear import RotatedLinear
from pairquant.models.blocks import after_head, find_blocks, head_block, read_by_head
from pairquant.spec.linear import Spec
from pairquant.support.errors import ConfigError

OPTIONS = {
    "preset": "quick",
    "group_size": 32,
    "rotations": 2,
    "samples": 4,
    "seq_len": 48,
    "calibration": (str(TEXT),),
}
TOKENS = torch.randint(3, 259, (4, 48), generator=torch.Generator().manual_seed(7))


def quantize(source, output, progress=None, **options):
    config = pairquant.QuantConfig(**{**OPTIONS, "head_bits": 6, **options})
    return pairquant.quantize(source, output, config, device="cpu", progress=progress)


def save(directory, tied, **sizes):
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, **sizes}, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def made(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("head")
    source = save(root / "source", request.param)
    heard = []

    class Heard(Silent):
        def notice(self, text):
            heard.append(text)

    quantize(source, root / "out", Heard())
    return root, request.param, heard


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def test_the_checkpoint_holds_both_embeddings_and_says_so(made):
    root, tied, heard = made
    tensors = load_file(root / "out" / "model.safetensors")
    assert {"lm_head.qweight", "lm_head.theta"} <= set(tensors)
    assert "lm_head.weight" not in tensors
    before = load_file(root / "source" / "model.safetensors")
    assert torch.equal(tensors["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    config = json.loads((root / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["dynamic"] == {r"+:^lm_head$": {"bits": 6}}
    assert any("--head-bits 6" in line for line in heard)
    assert any("was the input embedding" in line for line in heard) == tied
    assert any("takes 0.0 MB instead of 0.1 MB" in line for line in heard) != tied


def test_transformers_runs_it_as_decoded(made):
    root, _, _ = made
    model, original = load(root / "out"), load(root / "source")
    assert isinstance(model.lm_head, RotatedLinear)
    assert model.lm_head.layout.spec == Spec(6, 32, 2)
    assert not isinstance(model.model.embed_tokens, RotatedLinear)
    logits = model(TOKENS).logits
    packed = Checkpoint.open(ModelFiles.find(str(root / "out"))).packed("lm_head")
    model.lm_head = torch.nn.Linear(packed.layout.in_features, packed.layout.out_features, bias=False)
    model.lm_head.weight = torch.nn.Parameter(decode(packed))
    torch.testing.assert_close(logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert measure(load(root / "out"), TOKENS, original).kl < 2e-3


def test_export_save_and_inspect_know_it(made):
    root, _, _ = made
    assert len(pairquant.inspect(root / "out").linears) == 15
    pairquant.export(root / "out", root / "plain", to="fp32")
    plain, packed = load(root / "plain"), load(root / "out")
    torch.testing.assert_close(plain(TOKENS).logits, packed(TOKENS).logits, rtol=1e-3, atol=1e-4)
    packed.save_pretrained(root / "again")
    byte_tokenizer().save_pretrained(root / "again")
    assert torch.equal(load(root / "again")(TOKENS).logits, packed(TOKENS).logits)


def test_a_classifier_on_top_of_its_blocks_loads_too(made):
    root, _, _ = made
    model = AutoModelForSequenceClassification.from_pretrained(root / "out", dtype=torch.float32, num_labels=3)
    with torch.no_grad():
        expected = load(root / "out").model(TOKENS).last_hidden_state
        torch.testing.assert_close(model.model(TOKENS).last_hidden_state, expected)
    assert model.score.weight.std() > 0, "the new head is initialised"


def test_a_run_that_stopped_before_it_ends_with_the_same_bytes(made, tmp_path):
    root, _, _ = made

    class Stop(Silent):
        def block(self, result):
            if result.index == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(root / "source", tmp_path / "out", Stop())
    quantize(root / "source", tmp_path / "out")
    assert content(tmp_path / "out") == content(root / "out")


@pytest.mark.parametrize("preset", ["rtn", "fast", "best", "paper", "gptq"])
def test_every_recipe_quantizes_it(made, tmp_path, preset):
    root, _, _ = made
    sets = {
        "fast": ["head.steps=5"],
        "best": ["refit.epochs=1", "head.steps=5"],
        "paper": ["training.epochs=1", "training.weight_epochs=0", "training.validation_samples=2", "head.steps=5"],
        "gptq": ["head.steps=5"],
    }
    recipe = pairquant.spec.recipe.recipe_with(preset, sets.get(preset, []) + (["steps=5"] if preset != "rtn" else []))
    quantize(root / "source", tmp_path / "out", preset=preset, recipe=recipe)
    assert Checkpoint.open(ModelFiles.find(str(tmp_path / "out"))).layout("lm_head").bits == 6
    assert measure(load(tmp_path / "out"), TOKENS, load(root / "source")).kl < 0.1


def test_a_size_counts_it(made, tmp_path):
    root, _, _ = made
    quantize(root / "source", tmp_path / "out", target={"size_bytes": 420_000})
    file = tmp_path / "out" / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert 390_000 < file.stat().st_size - header <= 420_000
    assert Checkpoint.open(ModelFiles.find(str(tmp_path / "out"))).layout("lm_head").bits == 6


def test_a_model_that_asks_its_output_embedding_for_a_dtype_runs(tmp_path):
    source = make_source("Mamba", tmp_path / "source")
    quantize(source, tmp_path / "out")
    tokens = TOKENS[:, :24] % 100
    assert measure(load(tmp_path / "out"), tokens, load(source)).kl < 0.02
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert half(tokens).logits.isfinite().all()


@pytest.mark.parametrize("absent", [False, True])
def test_a_model_that_does_not_call_it_is_refused(monkeypatch, absent):
    def forward(self, input_ids, use_cache=False, **_):
        states = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return SimpleNamespace(logits=states @ self.lm_head.weight.to(states.device).T)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    model = tiny_model("llama")
    if absent:
        model.lm_head.to("meta")
    with torch.no_grad(), pytest.raises(ConfigError, match="LlamaForCausalLM does not call its output embedding"):
        read_by_head(model, find_blocks(model), torch.randn(1, 8, model.config.hidden_size))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_reads_is_what_a_forward_pass_gives_it(family):
    model = tiny_model(family)
    blocks, block = find_blocks(model), head_block(model)
    read, last = [], []
    block.module.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    blocks[-1].module.register_forward_hook(lambda _, __, out: last.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(TOKENS, use_cache=False)
        found = read_by_head(model, blocks, last[0])
    torch.testing.assert_close(found, read[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_does_to_its_logits_is_done_to_any(family):
    model = tiny_model(family)
    if caps := hasattr(model.config, "final_logit_softcapping"):  # Gemma 2 and 3
        model.config.final_logit_softcapping = 0.5  # far below the logits
    blocks, block = find_blocks(model), head_block(model)
    raw = []
    handle = block.module.register_forward_hook(lambda _, __, out: raw.append(out[0]))
    with torch.no_grad():
        expected = model(TOKENS[:1], use_cache=False).logits[0]
        handle.remove()
        found = after_head(model, blocks, raw[0])
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, raw[0]) != caps
    assert "forward" not in vars(block.module)


def test_vocabularies_and_models_that_do_not_allow_it_are_refused(tmp_path):
    odd = save(tmp_path / "odd", tied=False, vocab_size=291)
    with pytest.raises(
        ConfigError, match=r"lm_head cannot be stored: out_features 291 is not a multiple of 16 .* Leave --head-bits"
    ):
        quantize(odd, tmp_path / "out")
    with pytest.raises(ConfigError, match="head_bits is 7, allowed: 2, 3, 4, 5, 6, 8"):
        pairquant.QuantConfig(head_bits=7)
    with pytest.raises(ConfigError, match="LlamaModel has no output embedding, which cannot be quantized"):
        head_block(AutoModel.from_config(LlamaConfig(**SIZES)))
