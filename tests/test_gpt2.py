"""GPT-2: weights that Transformers holds as [C, N] are quantized, loaded and exported like any other."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TEXT, byte_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import pairquant
from pairquant.layers.model import rotated_linears


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("gpt2") / "source"
    config = GPT2Config(vocab_size=288, n_positions=128, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def test_quantized_loaded_and_exported(source, tmp_path):
    config = pairquant.QuantConfig(
        preset="quick", bits=8, group_size=32, rotations=2, samples=4, seq_len=64, calibration=(str(TEXT),)
    )
    summary = pairquant.quantize(source, tmp_path / "out", config)
    assert len(summary.errors) == 8
    assert max(summary.errors.values()) < 1e-3
    original = AutoModelForCausalLM.from_pretrained(source)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert len(list(rotated_linears(packed))) == 8
    tokens = torch.randint(3, 259, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = original(tokens).logits
        got = packed(tokens).logits
    assert (got - want).norm() / want.norm() < 0.02
    pairquant.export(tmp_path / "out", tmp_path / "plain", "fp32")
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    name = next(name for name in weights if name.endswith("h.0.attn.c_attn.weight"))
    assert weights[name].shape == (64, 192)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, got, rtol=1e-3, atol=1e-3)
