"""`pairquant export`: a plain model that engines without rotations load."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TEXT, save_tiny
from transformers import AutoModelForCausalLM

import pairquant
from pairquant.checkpoint import write

STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for directory in sys.argv[2:]:
    AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    torch.save((model.dtype, model(torch.load(sys.argv[1])).logits.float()), directory + "/logits.pt")
assert "pairquant" not in sys.modules, "this is to be Transformers alone"
"""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Qwen2: biases, which are stored in float16; one linear of each block left plain."""
    root = tmp_path_factory.mktemp("export")
    config = pairquant.QuantConfig(
        preset="quick", group_size=32, rotations=2, samples=4, seq_len=32, calibration=(str(TEXT),),
        ignore=("lm_head", "o_proj"),
    )  # fmt: skip
    pairquant.quantize(save_tiny(root / "source", "qwen2"), root / "checkpoint", config, device="cpu")
    return root / "checkpoint"


@torch.no_grad()
def test_transformers_alone_gives_the_packed_models_logits(checkpoint, tmp_path):
    tokens = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(5))
    expected = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)(tokens).logits
    torch.save(tokens, tmp_path / "tokens.pt")
    outputs = [pairquant.export(checkpoint, tmp_path / to, to) for to in DTYPES]
    subprocess.run([sys.executable, "-c", STOCK, tmp_path / "tokens.pt", *outputs], check=True)
    for output, tolerance in zip(outputs, (3e-2, 4e-3, 1e-6), strict=True):
        dtype, logits = torch.load(output / "logits.pt")
        assert dtype == DTYPES[output.name]
        assert (logits - expected).norm() / expected.norm() < tolerance


def test_everything_else_is_kept(checkpoint, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in checkpoint.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "unknown.table": torch.arange(5)}, source / "model.safetensors", {"format": "pt"})
    (source / "modeling_own.py").write_text("# custom code\n")
    (source / "README.md").write_text("# of the packed model\n")
    pairquant.export(source, tmp_path / "plain", "bf16")
    names = {file.name for file in (tmp_path / "plain").iterdir()}
    assert names == {file.name for file in source.iterdir()} - {"README.md", "pairquant.jsonl"}
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config == {
        **{k: v for k, v in json.loads((source / "config.json").read_text()).items() if k != "quantization_config"},
        "dtype": "bfloat16",
        "rope_theta": 10000.0,
    }
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert torch.equal(plain.pop("unknown.table"), torch.arange(5))
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16}
    kept = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(plain[kept], tensors[kept].bfloat16())
    assert not [name for name in plain if name.endswith(("qweight", "scales", "theta", "pairs"))]


def test_what_a_model_in_16_bits_stores_in_float32_stays_so(checkpoint, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in checkpoint.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    halved = {name: t.bfloat16() if t.dtype == torch.float32 else t for name, t in tensors.items()}
    bias = torch.tensor([1.0 + 2**-20, 2.0])
    save_file({**halved, "model.router.bias": bias}, source / "model.safetensors", {"format": "pt"})
    pairquant.export(source, tmp_path / "plain", "bf16")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert torch.equal(plain.pop("model.router.bias"), bias)
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16}


def test_no_more_than_a_shard_is_in_memory(checkpoint, tmp_path, monkeypatch):
    """Tensors are loaded shard by shard: each shard is written before the next one's first tensor is asked for."""
    monkeypatch.setattr(write, "SHARD_BYTES", 200_000)
    events = []
    plain_write = write.write_tensors
    monkeypatch.setattr(write, "write_tensors", lambda *a, **k: (events.append("write"), plain_write(*a, **k)))
    pairquant.export(checkpoint, tmp_path / "plain", "fp32", on_tensors=lambda count: lambda: events.append("load"))
    runs = "".join("w" if event == "write" else "l" for event in events).split("w")
    assert len(runs) > 3
    assert all(runs[:-1]), "a shard was written before its tensors were loaded"
    index = json.loads((tmp_path / "plain" / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == events.count("load")
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain")


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("bf61", "allowed: bf16, fp16, fp32.*did you mean 'bf16'"),
        ("awq", "layers of 12 have a transform"),
    ],
)
def test_unknown_formats_are_refused(checkpoint, tmp_path, to, message):
    with pytest.raises(pairquant.PairQuantError, match=message):
        pairquant.export(checkpoint, tmp_path / "plain", to)


def test_what_exists_or_is_not_ours_is_refused(checkpoint, tmp_path):
    with pytest.raises(pairquant.PairQuantError, match="exists. Choose another --output"):
        pairquant.export(checkpoint, tmp_path)
    with pytest.raises(pairquant.PairQuantError, match="is the source itself"):
        pairquant.export(checkpoint, checkpoint, overwrite=True)
    with pytest.raises(pairquant.PairQuantError, match="not quantized with pairwise rotations"):
        pairquant.export(checkpoint.parent / "source", tmp_path / "plain")


def test_values_beyond_float16_are_refused_and_nothing_is_left(checkpoint, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in checkpoint.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        pairquant.PairQuantError, match=r"model.norm.weight has values up to 1e\+06.*Export the checkpoint to bf16"
    ):
        pairquant.export(source, tmp_path / "plain", "fp16")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]
