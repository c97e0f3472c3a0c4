"""Engines are chosen by name, and models looked at before any is started."""

import importlib.util
import json

import pytest
from tiny_models import byte_tokenizer, save_tiny

from pairquant.checkpoint.read import ModelFiles
from pairquant.engines import choice
from pairquant.support.errors import CheckpointError, ConfigError, SourceError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("choice") / "model")


@pytest.fixture
def files(directory):
    return ModelFiles.find(str(directory))


@pytest.fixture
def installed(monkeypatch):
    """Says which packages are installed."""

    def pretend(*names):
        monkeypatch.setattr(choice, "find_spec", lambda name: object() if name in names else None)

    return pretend


def test_auto_is_vllm_where_it_is_preferred_and_installed(files, installed):
    installed("vllm")
    assert choice.choose("auto", files, prefer_vllm=True) == "vllm"
    assert choice.choose("auto", files, prefer_vllm=False) == "transformers"
    assert choice.choose("vllm", files, prefer_vllm=False) == "vllm"
    gguf = ModelFiles("m.gguf", files.directory, "m.gguf", False)
    assert choice.choose("auto", gguf, prefer_vllm=True) == "transformers"
    installed()
    assert choice.choose("auto", files, prefer_vllm=True) == "transformers"


def test_vllm_that_is_not_installed_is_refused_with_the_remedy(files, installed):
    installed()
    with pytest.raises(ConfigError, match=r"pip install 'pairquant\[vllm\]'"):
        choice.choose("vllm", files, prefer_vllm=True)


def test_an_unknown_engine_is_refused(files):
    with pytest.raises(ConfigError, match="engine is 'vlm', allowed: auto, transformers, vllm; did you mean 'vllm'"):
        choice.choose("vlm", files, prefer_vllm=True)


def test_every_engine_can_be_found():
    for module, _ in choice.ENGINES.values():
        assert importlib.util.find_spec(f"pairquant.engines.{module}") is not None


def test_a_model_without_tokenizer_is_refused(directory, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(directory / name)
    with pytest.raises(SourceError, match="no tokenizer"):
        choice.check_model(ModelFiles.find(str(tmp_path)))


def test_a_damaged_checkpoint_is_refused(directory, tmp_path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "paroquant", "bits": 4, "group_size": 32, "krot": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError):
        choice.check_model(ModelFiles.find(str(tmp_path)))


def test_a_broken_chat_template_is_refused_and_one_that_asks_for_another_form_is_not():
    tokenizer = byte_tokenizer()
    choice.check_template(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('begin with a system message') }}"
    choice.check_template(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}"
    with pytest.raises(SourceError, match="broken in line 1"):
        choice.check_template(tokenizer)
