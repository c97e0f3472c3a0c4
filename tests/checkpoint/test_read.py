"""Sources: which are taken, and which are refused by name before any work."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, TEXT, byte_tokenizer, save_tiny
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3MoeConfig,
)

import pairquant
from pairquant.checkpoint.architecture import require_one_tensor_a_name
from pairquant.checkpoint.headers import StoredTensors
from pairquant.checkpoint.read import ModelFiles
from pairquant.engines.choice import check_model
from pairquant.jobs.evaluate import evaluate
from pairquant.support.errors import CheckpointError, SourceError

RTN = pairquant.QuantConfig(preset="rtn", group_size=32)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("read") / "source")


@pytest.fixture(scope="module")
def quantized(pristine):
    pairquant.quantize(pristine, pristine.parent / "quantized", RTN, device="cpu")
    return pristine.parent / "quantized"


@pytest.fixture
def source(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "source")


def without(directory, *names):
    file = directory / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k not in names}, file, {"format": "pt"})


def change_config(directory, **entries):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def refused(directory, message, error=SourceError):
    """By every way into a model."""
    ways = {
        "quantize": lambda: pairquant.quantize(directory, directory.parent / "out", RTN, device="cpu"),
        "chat, serve, bench": lambda: check_model(ModelFiles.find(str(directory))),
        "eval, compare": lambda: evaluate(directory, texts=(str(TEXT),), seq_len=32, device="cpu"),
        "load": lambda: ModelFiles.find(str(directory)).model(),
    }
    for way, enter in ways.items():
        with pytest.raises(error, match=message):
            pytest.fail(f"not refused by {way}: {enter()}")
    assert not (directory.parent / "out").exists()


class TestMissing:
    def test_weights_are_named_and_counted(self, source):
        names = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("up", "gate", "down")]
        without(source, *names, "model.norm.weight")
        refused(source, r"lack 4 of the model's tensors: model\.layers\.1\.mlp\.down_proj\.weight, .*, …")

    def test_an_untied_output_embedding(self, source):
        without(source, "lm_head.weight")
        refused(source, r"lack 1 of the model's tensors: lm_head\.weight")

    def test_more_layers_than_there_are(self, source):
        change_config(source, num_hidden_layers=3)
        refused(source, r"lack \d+ of the model's tensors: model\.layers\.2\.")

    def test_a_reference(self, pristine, source):
        without(source, "model.norm.weight")
        with pytest.raises(SourceError, match=r"lack 1 of .*model\.norm\.weight"):
            evaluate(pristine, source, texts=(str(TEXT),), seq_len=32, device="cpu")

    def test_names_that_transformers_converts_are_not_missing(self, tmp_path):
        config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        byte_tokenizer().save_pretrained(tmp_path)
        files = ModelFiles.find(str(tmp_path))
        files.require_loadable()
        without(tmp_path, "lm_head.weight")
        with pytest.raises(SourceError, match=r"lack 1 of the model's tensors: lm_head\.weight"):
            files.require_loadable()

    def test_a_tied_output_embedding_is_not_missing(self, tmp_path):
        ModelFiles.find(str(save_tiny(tmp_path / "tied", "qwen3"))).require_loadable()

    @pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
    def test_a_checkpoints_plain_tensors_by_inspect_too(self, quantized, tmp_path, name):
        checkpoint = shutil.copytree(quantized, tmp_path / "checkpoint")
        assert pairquant.inspect(checkpoint).unknown is None
        without(checkpoint, name)
        for enter in (pairquant.inspect, lambda directory: check_model(ModelFiles.find(str(directory)))):
            with pytest.raises(CheckpointError, match=f"lack 1 of the model's tensors: {name}"):
                enter(checkpoint)

    def test_inspect_says_when_it_cannot_know(self, quantized, tmp_path):
        checkpoint = shutil.copytree(quantized, tmp_path / "checkpoint")
        change_config(checkpoint, model_type="of tomorrow")
        assert "configuration" in pairquant.inspect(checkpoint).unknown


class TestOtherFiles:
    def test_an_adapter_beside_the_model(self, source):
        (source / "adapter_config.json").write_text("{}")
        refused(source, r"LoRA adapter \(adapter_config\.json\)\. Merge it .*merge_and_unload")

    def test_an_adapter_alone(self, tmp_path):
        (tmp_path / "adapter_model.safetensors").write_bytes(b"")
        with pytest.raises(SourceError, match="LoRA adapter"):
            ModelFiles.find(str(tmp_path))

    def test_pickles_alone_are_refused_unopened(self, source, tmp_path):
        class Bomb:
            def __reduce__(self):
                return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

        (source / "model.safetensors").unlink()
        (source / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
        refused(source, r"only pytorch_model\.bin\. Weights of other formats, such as pickles, are not read")
        assert not (tmp_path / "ran").exists()

    def test_only_the_models_own_weights_count(self, source):
        files = ModelFiles.find(str(source))
        size = files.size_bytes()
        for name in ("consolidated.safetensors", "pytorch_model.bin", "model.fp16.safetensors"):
            shutil.copy(source / "model.safetensors", source / name)
        assert files.size_bytes() == size == (source / "model.safetensors").stat().st_size
        assert files.model().dtype == torch.float32

    def test_8_bit_floats_that_no_config_tells_of(self, source):
        file = source / "model.safetensors"
        tensors = load_file(file)
        name = "model.layers.0.mlp.up_proj.weight"
        save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, file, {"format": "pt"})
        with pytest.raises(SourceError, match="quantized to 8-bit floats already, without scales"):
            pairquant.quantize(source, source.parent / "out", RTN, device="cpu")


class TestClasses:
    def save(self, model, directory):
        model.save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
        return directory

    def test_an_encoder(self, tmp_path):
        config = BertConfig(
            vocab_size=288, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96
        )
        source = self.save(BertForMaskedLM(config), tmp_path / "bert")
        refused(source, "is a BertForMaskedLM, .* would be loaded as a BertLMHeadModel.*Decoder-only")

    def test_an_encoder_decoder(self, tmp_path):
        config = BartConfig(
            vocab_size=288, d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=96, decoder_ffn_dim=96,
            encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        source = self.save(BartForConditionalGeneration(config), tmp_path / "bart")
        refused(source, r"encoder-decoder model \(BartForConditionalGeneration\)\. Decoder-only")

    def test_a_decoder_with_another_head(self, tmp_path):
        source = self.save(LlamaForSequenceClassification(LlamaConfig(**SIZES)), tmp_path / "judge")
        refused(source, "is a LlamaForSequenceClassification, .* loaded as a LlamaForCausalLM")

    def test_an_older_spelling_of_a_decoder_is_kept(self, source):
        change_config(source, architectures=["LLaMAForCausalLM"])
        pairquant.quantize(source, source.parent / "out", RTN, device="cpu")
        written = json.loads((source.parent / "out" / "config.json").read_text())
        assert written["architectures"] == ["LLaMAForCausalLM"]

    def test_a_language_model_with_a_vision_tower_keeps_its_class(self, tmp_path):
        vision = {
            "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 64,
        }  # fmt: skip
        config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=287)
        source = self.save(LlavaForConditionalGeneration(config), tmp_path / "llava")
        pairquant.quantize(source, tmp_path / "out", RTN, device="cpu")
        assert type(ModelFiles.find(str(tmp_path / "out")).model()) is LlavaForConditionalGeneration
        found = pairquant.inspect(tmp_path / "out")
        assert found.unknown is None
        stored = StoredTensors.of_directory(source).fields
        assert all(f"{path}.weight" in stored and "language_model" in path for path in found.linears)

    def test_a_gguf_file_with_experts(self):
        config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        with pytest.raises(SourceError, match=r"'x\.gguf' is a GGUF file of a model with experts \(model\.layers\.0"):
            require_one_tensor_a_name(model, "x.gguf")
