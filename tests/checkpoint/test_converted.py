"""A checkpoint without transforms in other formats: the weights, everything around them, and what is refused."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from format_readers import READERS
from safetensors.torch import load_file
from test_families import make_source
from tiny_models import TEXT, save_tiny
from transformers import AutoModelForCausalLM

import pairquant
from pairquant.checkpoint.read import Checkpoint, ModelFiles
from pairquant.core.linear import decode
from pairquant.formats.table import FORMATS
from pairquant.spec.recipe import PRESETS
from pairquant.support.errors import CheckpointError, ConfigError

TOKENS = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(5))
OPTIONS = {"transform": "none", "group_size": 32, "samples": 2, "seq_len": 32, "calibration": (str(TEXT),)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("converted")


@pytest.fixture(scope="module")
def checkpoint(root):
    """Qwen2: biases; one linear of each block left plain."""
    config = pairquant.QuantConfig(preset="quick", ignore=("lm_head", "o_proj"), **OPTIONS)
    source = save_tiny(root / "source", "qwen2")
    pairquant.quantize(source, root / "checkpoint", FORMATS["awq"].settled(config), device="cpu")
    return root / "checkpoint"


@pytest.mark.parametrize("to", ["awq", "gptq", "compressed-tensors", "mlx"])
def test_a_reader_of_the_directory_finds_every_weight(checkpoint, tmp_path, to):
    output = pairquant.export(checkpoint, tmp_path / to, to)
    config = json.loads((output / "config.json").read_text())
    tensors, ours = load_file(output / "model.safetensors"), Checkpoint.open(ModelFiles.find(str(checkpoint)))
    quantization = config.get("quantization_config") or config["quantization"]
    for path in ours.stored.linears():
        packed = ours.packed(path)
        parts = {n: tensors.pop(f"{path}.{n}") for n in FORMATS[to].fields(packed.layout)}
        weight, expected = READERS[to](parts, quantization, packed), decode(packed)
        assert (weight - expected).norm() <= 1e-3 * expected.norm()
        if packed.bias is not None:
            assert torch.equal(tensors.pop(f"{path}.bias"), packed.bias)
    plain = {n: ours.stored.load(n) for n in ours.stored.fields if n not in ours.stored.packed_names()}
    assert tensors.keys() == plain.keys()
    assert all(torch.equal(tensors[n], plain[n].half()) for n in plain)
    assert config["dtype"] == "float16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert {f.name for f in output.iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.skipif(not importlib.util.find_spec("compressed_tensors"), reason="needs compressed-tensors")
@torch.no_grad()
def test_transformers_runs_compressed_tensors(root, tmp_path):
    config = pairquant.QuantConfig(preset="quick", overrides=("down_proj=bits:8,group_size:64",), **OPTIONS)
    form = FORMATS["compressed-tensors"]
    for name, options in {"zero-points": config, "symmetric": replace(config, symmetric=True)}.items():
        pairquant.quantize(save_tiny(tmp_path / name), tmp_path / f"{name}-4", form.settled(options), device="cpu")
        output = pairquant.export(tmp_path / f"{name}-4", tmp_path / f"{name}-ct", "compressed-tensors")
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-4", dtype=torch.float32)(TOKENS).logits
        found = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)(TOKENS).logits
        assert (found - expected).norm() <= 2e-3 * expected.norm(), name


def test_transforms_are_refused_with_the_remedies(root, tmp_path):
    source = save_tiny(tmp_path / "source")
    rotated = pairquant.QuantConfig(preset="quick", rotations=2, **{**OPTIONS, "transform": "rotated"})
    pairquant.quantize(source, tmp_path / "rotated", rotated, device="cpu")
    pairquant.quantize(source, tmp_path / "scaled", replace(rotated, rotations=0), device="cpu")
    for name in ("rotated", "scaled"):
        with pytest.raises(ConfigError, match=r"14 layers of 14 have a transform.*--format.*export to bf16"):
            pairquant.export(tmp_path / name, tmp_path / "out", "awq")
    assert not (tmp_path / "out").exists()


def test_embeddings_and_experts_without_a_place_are_refused(root, tmp_path):
    nearest = FORMATS["mlx"].settled(pairquant.QuantConfig(preset="rtn", group_size=32, head_bits=8, embedding_bits=8))
    pairquant.quantize(save_tiny(tmp_path / "source"), tmp_path / "embeddings", nearest, device="cpu")
    with pytest.raises(ConfigError, match="quantized embedding, which gptq does not hold"):
        pairquant.export(tmp_path / "embeddings", tmp_path / "out", "gptq")
    output = pairquant.export(tmp_path / "embeddings", tmp_path / "mlx", "mlx")
    assert {"model.embed_tokens.scales", "lm_head.biases"} <= load_file(output / "model.safetensors").keys()


@pytest.mark.parametrize(("name", "place"), [("Qwen3-MoE", "mlp"), ("Mixtral", "block_sparse_moe")])
def test_experts_in_one_tensor_lie_where_the_reader_looks(tmp_path, name, place):
    source, nearest = make_source(name, tmp_path / "source"), pairquant.QuantConfig(preset="rtn", group_size=32)
    pairquant.quantize(source, tmp_path / "packed", nearest, device="cpu")
    output = pairquant.export(tmp_path / "packed", tmp_path / "mlx", "mlx")
    tensors, config = load_file(output / "model.safetensors"), json.loads((output / "config.json").read_text())
    ours = Checkpoint.open(ModelFiles.find(str(tmp_path / "packed")))
    assert config["num_experts"] == 4
    for part, other in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        last = other if name == "Mixtral" else part
        stack = {n: tensors[f"model.layers.1.{place}.switch_mlp.{part}.{n}"] for n in ("weight", "scales", "biases")}
        for number in range(4):
            packed = ours.packed(f"model.layers.1.{place}.experts.{number}.{last}")
            one = READERS["mlx"]({n: t[number] for n, t in stack.items()}, config["quantization"], packed)
            assert (one - decode(packed)).norm() <= 1e-3 * decode(packed).norm()
    assert not [n for n in tensors if ".experts." in n]


def test_families_whose_experts_lie_elsewhere_are_refused_before_the_work(tmp_path):
    config = pairquant.QuantConfig(preset="rtn", group_size=32)
    with pytest.raises(ConfigError, match=r"family 'ernie4_5_moe' stores it, but of glm4_moe, mixtral, olmoe"):
        pairquant.quantize_as(
            "mlx", make_source("ERNIE 4.5 MoE", tmp_path / "it"), tmp_path / "mlx", config, device="cpu"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_numbers_beyond_float16_are_refused(checkpoint, tmp_path):
    from safetensors.torch import save_file

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"].float(), 1e6)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="more than torch.float16 holds"):
        pairquant.export(copy, tmp_path / "out", "awq")
    assert not (tmp_path / "out").exists()


def test_presets_without_a_transform_need_nothing_special(root, tmp_path):
    assert not PRESETS["rtn"].fits_transform
    pairquant.quantize(save_tiny(tmp_path / "source"), tmp_path / "rtn", pairquant.QuantConfig("rtn", group_size=32))
    pairquant.export(tmp_path / "rtn", tmp_path / "out", "awq")
