"""Mixed specs end to end: 5 and 6 bits and overrides through fit, checkpoint, inspect, Transformers, export and resume."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TEXT, save_tiny
from transformers import AutoModelForCausalLM

import pairquant
from pairquant.checkpoint.journal import Journal
from pairquant.checkpoint.read import Checkpoint, ModelFiles
from pairquant.core.linear import decode
from pairquant.jobs import quantize as job
from pairquant.layers.model import rotated_linears
from pairquant.spec.linear import Spec

OVERRIDES = ("down_proj=bits:6,group_size:32,rotations:0", "model.layers.1.self_attn=bits:5", "re:.*gate_proj$=bits:8")
EXPECTED = {
    "model.layers.0.mlp.down_proj": Spec(6, 32, 0),
    "model.layers.1.self_attn.o_proj": Spec(5, 64, 4),
    "model.layers.0.mlp.gate_proj": Spec(8, 64, 4),
    "model.layers.0.mlp.up_proj": Spec(4, 64, 4),
}


def options(**others):
    return pairquant.QuantConfig(
        **{
            "preset": "quick", "group_size": 64, "rotations": 4, "samples": 4, "seq_len": 64, "calibration": (str(TEXT),),
            "overrides": OVERRIDES, **others,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("mixed") / "source")


@pytest.fixture(scope="module")
def mixed(source):
    output = source.with_name("out")
    pairquant.quantize(source, output, options())
    return output


def test_the_checkpoint_says_what_each_layer_is(mixed):
    entries = json.loads((mixed / "config.json").read_text())["quantization_config"]
    assert [entries[key] for key in ("bits", "group_size", "krot")] == [4, 64, 4]
    assert entries["dynamic"][r"+:^model\.layers\.0\.mlp\.down_proj$"] == {"bits": 6, "group_size": 32, "krot": 0}
    assert entries["dynamic"]["-:^lm_head$"] == {}
    checkpoint = Checkpoint.open(ModelFiles.find(str(mixed)))
    for path, spec in EXPECTED.items():
        assert checkpoint.layout(path).spec == spec
        checkpoint.packed(path)


def test_inspect_checks_every_tensor_of_every_width(mixed):
    found = pairquant.inspect(mixed)
    assert len(found.linears) == 14
    damaged = mixed.with_name("damaged")
    damaged.mkdir()
    for file in mixed.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    config = json.loads((mixed / "config.json").read_text())
    config["quantization_config"]["dynamic"][r"+:^model\.layers\.0\.mlp\.down_proj$"]["bits"] = 5
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(pairquant.PairQuantError, match=r"layers\.0\.mlp\.down_proj"):
        pairquant.inspect(damaged)


def test_transformers_runs_every_width_as_decoded(mixed):
    checkpoint = Checkpoint.open(ModelFiles.find(str(mixed)))
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(mixed, dtype=dtype)
        layers = dict(rotated_linears(model))
        assert len(layers) == 14
        for path in EXPECTED:
            x = torch.randn(3, layers[path].in_features)
            with torch.no_grad():
                y = layers[path](x.to(dtype)).float()
            want = x @ decode(checkpoint.packed(path)).T
            assert (y - want).norm() / want.norm() < (1e-4 if dtype == torch.float32 else 2e-2), path


def test_export_gives_the_decoded_weights(mixed, tmp_path):
    pairquant.export(mixed, tmp_path / "plain", "fp32")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    checkpoint = Checkpoint.open(ModelFiles.find(str(mixed)))
    for path in EXPECTED:
        assert torch.equal(plain[f"{path}.weight"], decode(checkpoint.packed(path)))


def test_a_stopped_run_continues_and_another_plan_does_not(mixed, source, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    plain = Journal.append

    def stop(self, *args):
        if self.count == 1:
            raise Stopped
        plain(self, *args)
        self.settle()

    with monkeypatch.context() as patch:
        patch.setattr(job.Journal, "append", stop)
        with pytest.raises(Stopped):
            pairquant.quantize(source, tmp_path / "out", options())
    with pytest.raises(pairquant.PairQuantError, match=r"config\.overrides"):
        pairquant.quantize(source, tmp_path / "out", options(overrides=OVERRIDES[:1]))
    pairquant.quantize(source, tmp_path / "out", options())
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (mixed / "model.safetensors").read_bytes()


class Heard:
    """A progress that keeps the notices."""

    def __init__(self):
        self.notices = []

    def notice(self, text):
        self.notices.append(text)

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def test_exceptions_and_layers_that_vllm_will_refuse_are_said(source, tmp_path):
    heard = Heard()
    config = options(preset="rtn", overrides=("k_proj=bits:8",))
    pairquant.quantize(source, tmp_path / "out", config, progress=heard)
    assert "2 layers at 8 bits, groups of 64, 0 rotations: --override k_proj=bits:8" in heard.notices
    assert any("vLLM runs them as one layer and will refuse" in text for text in heard.notices)


def test_poor_layers_are_named(source, tmp_path):
    heard = Heard()
    config = options(preset="rtn", bits=2, overrides=())
    summary = pairquant.quantize(source, tmp_path / "out", config, progress=heard)
    assert summary.poor
    assert all(summary.errors[path] > 0.2 for path in summary.poor)
    worst = next(iter(summary.poor))
    assert any(text.startswith(f"the output's relative error is above 20%: {worst} ") for text in heard.notices)
