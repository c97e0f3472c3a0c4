"""One weight's life, from a source directory to a running model, with an assertion at each step."""

import json

import torch
from safetensors.torch import load_file
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import pairquant
from pairquant.checkpoint.read import Checkpoint, ModelFiles
from pairquant.core.linear import decode, forward, rotated_weight, transform_of
from pairquant.core.packing import unpack
from pairquant.jobs import trace

PATH = "model.layers.1.mlp.down_proj"


def test_the_life_of_one_weight(tmp_path):
    # ① a source on disk
    source = save_tiny(tmp_path / "source")
    weight = load_file(source / "model.safetensors")[f"{PATH}.weight"]

    # ② the walk over blocks, down to the checkpoint
    config = pairquant.QuantConfig(
        preset="quick", group_size="auto", samples=8, seq_len=64, calibration=("default",), rotations=4
    )
    summary = pairquant.quantize(source, tmp_path / "out", config)
    assert summary.config.group_size == 64
    checkpoint = Checkpoint.open(ModelFiles.find(str(tmp_path / "out")))
    packed = checkpoint.packed(PATH)

    # ③ scaling and rotating loses nothing
    transform = transform_of(packed)
    turned = transform.weight_in(weight)
    torch.testing.assert_close(transform.weight_out(turned), weight, rtol=1e-4, atol=1e-5)
    assert packed["theta"].abs().sum() > 0

    # ④ ⑤ each rotated weight lies on the grid, its code within range
    codes, zeros = unpack(packed["qweight"], 4), unpack(packed["qzeros"], 4)
    assert codes.max() <= 15
    by_hand = (codes[70, 5].float() - zeros[1, 5].float()) * packed["scales"][1, 5].float()
    assert rotated_weight(packed)[5, 70] == by_hand

    # ⑥ ⑦ what is on disk is what was packed, and config.json says how to read it
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert [entries[key] for key in ("quant_method", "bits", "group_size", "krot")] == ["paroquant", 4, 64, 4]
    assert entries["modules_to_not_convert"] == ["lm_head"]

    # ⑧ decoded, it is the original up to rounding
    decoded = decode(packed)
    assert 0 < (decoded - weight).norm() / weight.norm() < 0.2
    assert summary.errors[PATH] < 0.02

    # ⑨ and it runs: in Transformers as in the reference
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    x = torch.randn(3, weight.shape[1])
    expected = forward(packed, x)
    torch.testing.assert_close(expected, x @ decoded.T, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model.get_submodule(PATH)(x), expected, rtol=1e-3, atol=1e-4)

    # and `inspect --linear` tells the same story
    steps, remark = trace.trace(tmp_path / "out", PATH)
    assert [step.name for step in steps if step.name] == [
        "① source", "② scaled", "③ rotated", "④ grid", "⑤ rounded", "⑥ stored", "⑧ decoded", "⑨ run",
    ]  # fmt: skip
    assert "compared with" in remark
