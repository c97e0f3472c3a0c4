"""`model.dequantize()`: back to a plain model."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import pairquant  # noqa: F401
from pairquant.layers.linear import RotatedLinear

STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
assert "pairquant" not in sys.modules, "this is to be Transformers alone"
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@torch.no_grad()
def test_saved_it_loads_in_transformers_alone(tiny_checkpoint, tokens, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    expected = model(tokens).logits
    model.dequantize().save_pretrained(tmp_path / "plain")
    assert not hasattr(model, "hf_quantizer")
    assert not model.is_quantized
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    torch.save(tokens, tmp_path / "tokens.pt")
    subprocess.run(
        [sys.executable, "-c", STOCK, tmp_path / "plain", tmp_path / "tokens.pt", tmp_path / "logits.pt"], check=True
    )
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("loaded", "cast", "asked", "dtype"),
    [
        (torch.bfloat16, None, None, torch.bfloat16),
        (torch.float32, torch.bfloat16, None, torch.bfloat16),
        (torch.float32, None, torch.float16, torch.float16),
    ],
    ids=["as loaded", "as cast since", "as asked for"],
)
@torch.no_grad()
def test_the_whole_model_has_one_dtype(tiny_checkpoint, tokens, loaded, cast, asked, dtype):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=loaded)
    expected = model(tokens).logits.float()
    plain = (model.to(cast) if cast else model).dequantize(dtype=asked)
    assert {parameter.dtype for parameter in plain.parameters()} == {dtype}
    assert (plain(tokens).logits.float() - expected).norm() / expected.norm() < 0.05


def test_a_saved_model_whose_dtype_became_a_name_is_still_dequantized(tiny_checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")  # turns config.dtype into a string
    assert model.dequantize().dtype == torch.float32


def test_a_model_that_rounds_activations_says_that_it_no_longer_does(rounding_checkpoint, tiny_checkpoint, recwarn):
    AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).dequantize()
    assert not [warning for warning in recwarn if "round what they read" in str(warning.message)]
    model = AutoModelForCausalLM.from_pretrained(rounding_checkpoint, dtype=torch.float32)
    with pytest.warns(UserWarning, match="round what they read to int8.*To keep the rounding"):
        model.dequantize()
    assert not any(isinstance(module, RotatedLinear) for module in model.modules())
