"""Who runs each layer of a checkpoint here, by kind and layout."""

import pytest
import torch
from test_families import make_source
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import pairquant
from pairquant.backends.table import explain
from pairquant.cli.app import app
from pairquant.jobs.inspect import backends
from pairquant.layers.experts import RotatedExperts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspect")
    config = pairquant.QuantConfig(
        preset="rtn", group_size=32, overrides=("down_proj=bits:5", "model.layers.0.self_attn.o_proj=bits:2")
    )
    pairquant.quantize(save_tiny(root / "source"), root / "out", config, device="cpu")
    return root / "out"


def test_layers_of_one_kind_share_a_row(checkpoint):
    rows = backends(checkpoint, "cpu")
    assert sum(row.count for row in rows) == 14
    found = {(row.names, row.layout.bits): (row.count, row.explanation.backend) for row in rows}
    assert found[("q", 4)] == (2, "cpu-int4")
    assert found[("down", 5)] == (2, "decoded")
    assert found[("o", 2)] == (1, "decoded")
    assert found[("o", 4)] == (1, "cpu-int4")
    assert {row.explanation.backend for row in backends(checkpoint, "cpu", "float32")} == {"decoded"}
    for row in rows:
        assert row.explanation == explain(row.layout, torch.device("cpu"), torch.bfloat16)


def test_experts_are_explained_by_the_whole_block(tmp_path):
    """Of the two blocks, one has a weight that the product for experts on CPUs does not multiply."""
    source = make_source("Mixtral", tmp_path / "source")
    config = pairquant.QuantConfig(preset="rtn", group_size=32, overrides=("re:.*layers.0.*experts.*w2=bits:6",))
    pairquant.quantize(source, tmp_path / "out", config, device="cpu")
    rows = [row for row in backends(tmp_path / "out", "cpu") if row.names.startswith("w")]
    assert all(row.count == 4 for row in rows), "those of a block share a row"
    found = sorted((row.names, row.layout.bits, row.explanation.backend) for row in rows)
    runs, decoded = [(f"w{i}", 4, "cpu-int4") for i in (1, 2, 3)], [("w1", 4, "decoded"), ("w2", 6, "decoded")]
    assert found == sorted([*runs, *decoded, ("w3", 4, "decoded")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    first, second = (module for module in model.modules() if isinstance(module, RotatedExperts))
    assert (first.prepare(torch.bfloat16), second.prepare(torch.bfloat16)) == (False, True), "the model says the same"


def test_linears_are_not_explained_as_experts(checkpoint, tmp_path):
    """Experts with rounded activations have no kernel on GPUs; linears do, whatever machine this is."""
    config = pairquant.QuantConfig(preset="rtn", group_size=32, activations="int4")
    pairquant.quantize(save_tiny(tmp_path / "source"), tmp_path / "out", config, device="cpu")
    reasons = {row.explanation.refusals.get("triton", "") for row in backends(tmp_path / "out", "cpu")}
    assert reasons == {"runs on NVIDIA GPUs, not on cpu"}


def test_an_unknown_dtype_is_refused(checkpoint):
    with pytest.raises(pairquant.PairQuantError, match="did you mean 'float16'"):
        backends(checkpoint, "cpu", "float61")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_command_shows_every_reason_and_what_is_mixed(checkpoint):
    shown = CliRunner().invoke(app, ["inspect", str(checkpoint), "--backends"]).output
    assert "triton runs on NVIDIA GPUs, not on cpu" in shown
    assert "cpu-int4 multiplies 4-bit weights, the layer has 5" in shown
    plain = CliRunner().invoke(app, ["inspect", str(checkpoint)]).output
    assert "5 bits, groups of 32, 0 rotations (2 layers)" in plain
