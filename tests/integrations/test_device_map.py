"""Models spread by Accelerate; layers offloaded to the disk."""

import pytest
import torch
from agreement import ROUNDING, distance
from transformers import AutoModelForCausalLM

import pairquant
from pairquant.layers.model import rotated_linears

EXPLICIT = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu",
    "model.layers.0": "cpu", "model.layers.1": "disk",
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "auto"},
        {"device_map": "cpu"},
        {"device_map": EXPLICIT},
        {"device_map": EXPLICIT, "offload_buffers": True},
    ],
    ids=["auto", "cpu", "disk", "disk with buffers"],
)
@torch.no_grad()
def test_logits_are_the_same_wherever_layers_lie(tiny_checkpoint, tokens, tmp_path, dtype, options):
    expected = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=dtype)(tokens).logits
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=dtype, offload_folder=tmp_path, **options)
    if torch.cuda.is_available():
        pytest.skip("the comparison is for machines without a GPU")
    for _ in range(2):
        assert distance(model(tokens).logits, expected) <= ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_an_offloaded_layer_holds_nothing_between_forwards(tiny_checkpoint, tokens, tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint, dtype=dtype, device_map=EXPLICIT, offload_folder=tmp_path, offload_buffers=True
    )
    model(tokens)
    for path, layer in rotated_linears(model):
        kept = layer._kept
        if path.startswith("model.layers.1."):
            assert layer.qweight.is_meta
            assert kept is None
            assert not layer._merged.gathered(), "it would be repacked without its codes"
        else:
            assert kept is not None or layer._merged.backend is not None


def test_dequantizing_offloaded_layers_says_what_to_do(tiny_checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint, device_map=EXPLICIT, offload_folder=tmp_path, offload_buffers=True
    )
    with pytest.raises(pairquant.PairQuantError, match=r"7 layers are offloaded.*pairquant export"):
        model.dequantize()
