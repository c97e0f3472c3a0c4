"""The weights that a checkpoint was made from: found, turned the right way, or missing with a reason."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny

import pairquant
from pairquant.checkpoint.original import Original, sites_of
from pairquant.checkpoint.read import Checkpoint, ModelFiles

PATH = "model.layers.0.mlp.up_proj"


@pytest.fixture
def made(tmp_path):
    source = save_tiny(tmp_path / "source")
    pairquant.quantize(source, tmp_path / "out", pairquant.QuantConfig(preset="rtn", group_size=32))
    return source, Checkpoint.open(ModelFiles.find(str(tmp_path / "out")))


def test_the_source_that_is_recorded_is_read(made):
    source, checkpoint = made
    original = Original(checkpoint)
    weight = original.weight(PATH)
    assert torch.equal(weight, load_file(source / "model.safetensors")[f"{PATH}.weight"].float())
    assert original.remark == f"compared with {source}"


def test_a_source_that_is_gone_is_said(made):
    source, checkpoint = made
    shutil.rmtree(source)
    original = Original(checkpoint)
    assert original.weight(PATH) is None
    assert "is not on this machine" in original.remark


def test_a_source_that_has_become_another_model_is_said(made, tmp_path):
    source, checkpoint = made
    shutil.rmtree(source)
    save_tiny(source, "phi3")
    original = Original(checkpoint)
    assert original.weight(PATH) is None
    assert "cannot be read" in original.remark
    assert original.weight(PATH) is None


def test_sites_are_those_of_the_class(made):
    source, _ = made
    sites, _ = sites_of(ModelFiles.find(str(source)))
    assert PATH in sites
    assert sites[PATH].module.weight.is_meta
