"""What stands beside a checkpoint's weights: the source's own files, and its config.json key for key."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_models import SIZES, byte_tokenizer, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig

import pairquant
from pairquant.checkpoint.describe import state_dtype, state_experts, untie
from pairquant.checkpoint.headers import StoredTensors
from pairquant.checkpoint.read import ModelFiles
from pairquant.support.errors import SourceError

RTN = pairquant.QuantConfig(preset="rtn", group_size=32)
#: As Transformers 4 wrote it: keys, the tokenizer's class and entries that its successor has renamed.
OLD_CONFIG = {
    **{k: v for k, v in SIZES.items() if k != "head_dim"},
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 500000.0, "torch_dtype": "float32",
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64, "rope_type": "llama3"},
    "transformers_version": "4.40.0", "temperature": 0.6, "top_p": 0.9, "unknown_key": [1, {"a": None}], "tie_word_embeddings": False,
}  # fmt: skip
OLD_TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<s>"], "bos_token": "<s>",
    "eos_token": "</s>", "pad_token": "<pad>", "model_max_length": 128, "clean_up_tokenization_spaces": True,
}  # fmt: skip
GENERATION = b'{"do_sample": false, "temperature": 0.6, "top_p": 0.9, "_from_model_config": true}'
BESIDE = {
    "tokenizer.model": b"\x00sentencepiece", "preprocessor_config.json": b"{ }", "LICENSE": b"as you like\r\n",
    "README.md": b"---\nlicense: mit\n---\n# Tiny\n", "additional_chat_templates/tools.jinja": b"{{ x }}",
    "modeling_own.py": b"# custom code", "generation_config.json": GENERATION,
    "tokenizer_config.json": json.dumps(OLD_TOKENIZER).encode(),
}  # fmt: skip


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A source with the older keys and with files beside, and its checkpoint."""
    root = tmp_path_factory.mktemp("describe")
    torch.manual_seed(0)
    source = root / "source"
    LlamaForCausalLM(LlamaConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"})).save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    (source / "config.json").write_text(json.dumps(OLD_CONFIG))
    for name, content in BESIDE.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    (source / "consolidated.safetensors").write_bytes(b"not the model's")
    pairquant.quantize(source, root / "out", RTN, device="cpu")
    return root


def test_config_json_is_the_sources_key_for_key(old):
    written = json.loads((old / "out" / "config.json").read_text())
    assert written.pop("quantization_config")["quant_method"] == "paroquant"
    assert written == OLD_CONFIG
    assert list(written) == list(OLD_CONFIG)


def test_every_other_file_has_the_sources_bytes(old):
    for name in ("tokenizer.json", *BESIDE):
        assert (old / "out" / name).read_bytes() == (old / "source" / name).read_bytes(), name
    assert not (old / "out" / "consolidated.safetensors").exists()


def test_the_checkpoint_loads_with_the_sources_positions_and_tokenizer(old):
    model, source = (AutoModelForCausalLM.from_pretrained(old / name) for name in ("out", "source"))
    assert model.config.rope_parameters == source.config.rope_parameters
    assert model.config.rope_parameters["rope_theta"] == 500000
    tokenizers = [AutoTokenizer.from_pretrained(old / name) for name in ("out", "source")]
    assert len({tuple(tokenizer("hello")["input_ids"]) for tokenizer in tokenizers}) == 1


def test_export_keeps_them_too(old, tmp_path):
    pairquant.export(old / "out", tmp_path / "plain", "bf16")
    written = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert written == {**OLD_CONFIG, "torch_dtype": "bfloat16"}
    for name, content in BESIDE.items():
        assert (tmp_path / "plain" / name).read_bytes() == content, name


def test_a_card_that_speaks_of_the_packed_model_is_not_exported(old, tmp_path):
    checkpoint = shutil.copytree(old / "out", tmp_path / "out")
    (checkpoint / "README.md").write_text("# 4 bits\n")
    pairquant.export(checkpoint, tmp_path / "plain", "bf16")
    assert not (tmp_path / "plain" / "README.md").exists()


@pytest.mark.parametrize(
    ("source", "dtype", "key"), [({}, "bfloat16", "torch_dtype"), ({"dtype": None}, "bfloat16", "dtype")]
)
def test_a_config_without_class_and_dtype_gets_those_of_the_weights(tmp_path, source, dtype, key):
    """With float16 scales beside the weights, readers could not guess the dtype any more."""
    directory = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    config = json.loads((directory / "config.json").read_text())
    kept = {k: v for k, v in config.items() if k not in ("dtype", "architectures")} | source
    (directory / "config.json").write_text(json.dumps(kept))
    pairquant.quantize(directory, tmp_path / "out", RTN, device="cpu")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written[key] == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_the_dtype_is_stated_in_every_part_under_the_key_in_use():
    config = {"torch_dtype": "float32", "text_config": {"dtype": "float32"}, "vision_config": {"depth": 1}}
    state_dtype(config, torch.float16)
    assert config == {
        "torch_dtype": "float16", "text_config": {"dtype": "float16"}, "vision_config": {"depth": 1},
    }  # fmt: skip


def test_what_cannot_be_saved_fails_before_the_walk(tmp_path, monkeypatch):
    def fails(*_):
        raise ValueError("GenerationConfig is invalid")

    source = save_tiny(tmp_path / "source")
    monkeypatch.setattr(ModelFiles, "describe", fails)
    monkeypatch.setattr("pairquant.jobs.quantize.Walk", lambda *_, **__: pytest.fail("the walk has begun"))
    with pytest.raises(SourceError, match="cannot be saved: GenerationConfig is invalid"):
        pairquant.quantize(source, tmp_path / "out", RTN, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_tensors_that_transformers_converts_keep_the_sources_names(tmp_path):
    config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    config = replace(RTN, ignore=("lm_head", "re:.*experts.*"))
    pairquant.quantize(tmp_path / "source", tmp_path / "out", config, device="cpu")
    source, out = (StoredTensors.of_directory(tmp_path / name) for name in ("source", "out"))
    plain = set(out.fields) - out.packed_names()
    assert "model.layers.0.mlp.experts.0.down_proj.weight" in plain
    assert plain <= set(source.fields)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_output_embedding_of_its_own_is_stated_for_the_language_model_too():
    config = {
        "text_config": {"vocab_size": 9},
        "vision_config": {"hidden_size": 4},
        "audio": {"tie_word_embeddings": True},
    }
    untie(config)
    assert config == {
        "text_config": {"vocab_size": 9, "tie_word_embeddings": False},
        "vision_config": {"hidden_size": 4},
        "audio": {"tie_word_embeddings": False},
        "tie_word_embeddings": False,
    }


def test_the_number_of_experts_has_its_older_name_too():
    for before, after in (({"num_local_experts": 4}, 4), ({"num_experts": 8}, 8), ({}, None)):
        state_experts(before)
        assert before.get("num_experts") == after
