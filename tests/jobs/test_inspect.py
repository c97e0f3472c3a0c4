"""Who runs each layer of a checkpoint here, by kind and layout."""

import pytest
import torch
from tiny_models import save_tiny
from typer.testing import CliRunner

import pairquant
from pairquant.backends.table import explain
from pairquant.cli.app import app
from pairquant.jobs.inspect import backends


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
