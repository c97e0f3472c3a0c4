"""Our checkpoints in plain Transformers code."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES, TEXT, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import pairquant
from pairquant.layers.model import rotated_linears

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    source = save_tiny(root / "source", request.param)
    config = pairquant.QuantConfig(
        preset="quick", group_size=32, rotations=2, samples=4, seq_len=32, calibration=(str(TEXT),)
    )
    pairquant.quantize(source, root / "checkpoint", config, device="cpu")
    return root / "checkpoint"


@pytest.fixture
def tokens():
    return torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(5))


def test_every_linear_of_the_blocks_is_quantized(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    plain = [p for p, m in model.model.layers.named_modules() if type(m) is torch.nn.Linear]
    assert plain == []
    assert len(list(rotated_linears(model))) in (8, 12, 14)  # phi3 and glm4 have fused projections


def test_save_pretrained_gives_back_the_same_file(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model(torch.tensor([[5, 6, 7]]))
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(d / "model.safetensors") for d in (checkpoint, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 0.1)])
def test_dtypes_agree_within_their_rounding(checkpoint, tokens, device, dtype, tolerance):
    exact = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device)
    assert model.dtype == dtype
    with torch.no_grad():
        expected, logits = exact(tokens).logits, model(tokens.to(device)).logits.float().cpu()
    assert (logits - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_caches_equals_generate_without(checkpoint, cache):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer("once upon a time", return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    plain = model.generate(**inputs, use_cache=False, **options)
    assert torch.equal(model.generate(**inputs, cache_implementation=cache, **options), plain)


def test_dequantize_gives_a_plain_model_with_the_same_logits(checkpoint, tokens):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = model(tokens).logits
        plain = model.dequantize()
        torch.testing.assert_close(plain(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    assert list(rotated_linears(plain)) == []


@pytest.mark.parametrize("order", ["pairquant, transformers", "transformers, pairquant"])
def test_importing_pairquant_before_or_after_transformers_is_enough(order):
    code = (
        f"import {order}; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print('paroquant' in m)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_importing_pairquant_alone_loads_neither_torch_nor_transformers():
    code = "import sys, pairquant; print(sorted({'torch', 'transformers', 'rich', 'typer'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
