"""Sources in 8-bit floats with scales of blocks, and in MXFP4: quantized as the tensors that they stand for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import make_source
from tiny_models import SIZES, TEXT, byte_tokenizer, save_tiny
from transformers import AutoModelForCausalLM, LlamaConfig

import pairquant
from pairquant.checkpoint.headers import StoredTensors
from pairquant.checkpoint.read import ModelFiles
from pairquant.support.errors import SourceError

CONFIG = pairquant.QuantConfig(
    preset="quick", group_size=32, rotations=2, samples=2, seq_len=32, calibration=(str(TEXT),)
)
ENTRIES = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def as_fp8(source, directory):
    """The model in 8-bit floats, with a scale for each block of 128 × 128, and beside it in bfloat16, dequantized."""
    tensors = load_file(source / "model.safetensors")
    small, plain = {}, {}
    for name, tensor in tensors.items():
        tensor = tensor.bfloat16()
        if ".layers." not in name or tensor.dim() != 2 or "norm" in name or "gate.weight" in name:
            small[name] = plain[name] = tensor
            continue
        rows, columns = (-(-size // 128) for size in tensor.shape)
        scales = torch.empty(rows, columns)
        codes, whole = (
            torch.empty_like(tensor, dtype=torch.float8_e4m3fn),
            torch.empty_like(tensor, dtype=torch.float32),
        )
        for i in range(rows):
            for j in range(columns):
                place = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                scales[i, j] = tensor[place].float().abs().max() / 448
                codes[place] = (tensor[place].float() / scales[i, j]).to(torch.float8_e4m3fn)
                whole[place] = codes[place].float() * scales[i, j]
        small |= {name: codes, f"{name}_scale_inv": scales}
        plain[name] = whole.bfloat16()
    for kind, content in (("small", small), ("plain", plain)):
        (directory / kind).mkdir(parents=True)
        for file in source.iterdir():
            if file.suffix != ".safetensors":
                (directory / kind / file.name).write_bytes(file.read_bytes())
        save_file(content, directory / kind / "model.safetensors", {"format": "pt"})
        config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
        config |= {"quantization_config": ENTRIES} if kind == "small" else {}
        (directory / kind / "config.json").write_text(json.dumps(config))
    return directory / "small", directory / "plain"


@pytest.mark.parametrize("family", ["llama", "Qwen3-MoE"])
def test_the_checkpoint_is_that_of_the_dequantized_model(family, tmp_path):
    source = save_tiny(tmp_path / "s") if family == "llama" else make_source(family, tmp_path / "s")
    small, plain = as_fp8(source, tmp_path)
    for kind in (small, plain):
        pairquant.quantize(kind, tmp_path / f"{kind.name}-out", CONFIG, device="cpu")
    first, second = (tmp_path / f"{kind.name}-out" / "model.safetensors" for kind in (small, plain))
    assert first.read_bytes() == second.read_bytes()
    config = json.loads((tmp_path / "small-out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "paroquant"


def test_it_loads_as_the_original_of_an_evaluation(tmp_path):
    """Transformers dequantizes here. Its blocks are all of one size, ours end where the matrix does: sizes of 128 agree."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | {"intermediate_size": 256}))
    model.save_pretrained(tmp_path / "s")
    byte_tokenizer().save_pretrained(tmp_path / "s")
    small, plain = as_fp8(tmp_path / "s", tmp_path)
    found = ModelFiles.find(str(small)).model().state_dict()
    expected = ModelFiles.find(str(plain)).model().state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_scales_are_no_tensors_of_their_own(tmp_path):
    small, _ = as_fp8(save_tiny(tmp_path / "s"), tmp_path)
    stored = StoredTensors.of_directory(small)
    name = "model.layers.0.mlp.up_proj.weight"
    assert stored.fields[name].dtype == stored.load(name).dtype == torch.bfloat16
    assert not any(each.endswith("_scale_inv") for each in stored.fields)


def test_8_bit_floats_without_scales_are_refused(tmp_path):
    small, _ = as_fp8(save_tiny(tmp_path / "s"), tmp_path)
    tensors = load_file(small / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, small / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match="up_proj.weight .*without scales"):
        pairquant.quantize(small, tmp_path / "out", CONFIG, device="cpu")


def as_mxfp4(source, directory):
    """A gpt-oss with experts in MXFP4, by codes drawn at random, and beside it in bfloat16, decoded by Transformers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    small = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, channels, rows = tensor.shape
            codes = torch.randint(0, 256, (experts, rows, channels // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(118, 124, codes.shape[:3], dtype=torch.uint8, generator=generator)
            del small[name]
            small |= {f"{name}_blocks": codes, f"{name}_scales": scales}
            tensors[name] = convert_moe_packed_tensors(codes, scales).contiguous()
    for kind, content in (("small", small), ("plain", tensors)):
        (directory / kind).mkdir(parents=True)
        for file in source.iterdir():
            if file.suffix != ".safetensors":
                (directory / kind / file.name).write_bytes(file.read_bytes())
        save_file(content, directory / kind / "model.safetensors", {"format": "pt"})
        config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
        config |= {"quantization_config": {"quant_method": "mxfp4"}} if kind == "small" else {}
        (directory / kind / "config.json").write_text(json.dumps(config))
    return directory / "small", directory / "plain"


def test_mxfp4_is_read_as_what_it_stands_for(tmp_path):
    small, plain = as_mxfp4(make_source("gpt-oss", tmp_path / "s"), tmp_path)
    found, expected = (StoredTensors.of_directory(each) for each in (small, plain))
    assert set(found.fields) == set(expected.fields)
    for name, field in expected.fields.items():
        assert found.fields[name].shape == field.shape
        assert torch.equal(found.load(name), expected.load(name)), name
    for kind in (small, plain):
        pairquant.quantize(kind, tmp_path / f"{kind.name}-out", CONFIG, device="cpu")
    first, second = (tmp_path / f"{kind.name}-out" / "model.safetensors" for kind in (small, plain))
    assert first.read_bytes() == second.read_bytes()
