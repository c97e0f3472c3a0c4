"""The life of one weight is told with errors that agree with the checkpoint's, and without the source as far as it goes."""

import shutil

import pytest
from tiny_models import TEXT, save_tiny

import pairquant
from pairquant.jobs.trace import WITHOUT_WEIGHT, trace
from pairquant.support.errors import CheckpointError

PATH = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("trace")
    config = pairquant.QuantConfig(
        preset="quick", group_size=32, rotations=2, samples=2, seq_len=32, calibration=(str(TEXT),)
    )
    pairquant.quantize(save_tiny(root / "source"), root / "packed", config, device="cpu")
    return root


def test_every_step_is_there_and_errors_are_of_the_size_of_rounding(directory):
    steps, remark = trace(directory / "packed", PATH)
    by_tensor = {step.tensor: step for step in steps}
    assert [step.name for step in steps if step.name] == [
        "① source", "② scaled", "③ rotated", "④ grid", "⑤ rounded", "⑥ stored", "⑧ decoded", "⑨ run",
    ]  # fmt: skip
    assert by_tensor["(W · diag(a)) R"].error < 1e-5  # the transform loses nothing
    assert 0.01 < by_tensor["Ŵ"].error < 0.3
    assert by_tensor["rotate(x) · ŵᵀ against x · Ŵᵀ"].error < 1e-4
    assert by_tensor["W"].shape == by_tensor["Ŵ"].shape
    assert by_tensor["qweight"].dtype == "int32"
    assert WITHOUT_WEIGHT not in remark


def test_without_the_source_the_stored_steps_remain(directory, tmp_path):
    moved = tmp_path / "alone"
    shutil.copytree(directory / "packed", moved)
    hidden = (directory / "source").rename(directory / "hidden")
    try:
        steps, remark = trace(moved, PATH)
    finally:
        hidden.rename(directory / "source")
    assert remark.endswith(WITHOUT_WEIGHT)
    assert "① source" not in [step.name for step in steps]
    assert next(step for step in steps if step.tensor == "Ŵ").error is None


def test_a_linear_that_is_not_there_is_named(directory):
    with pytest.raises(CheckpointError, match="did you mean"):
        trace(directory / "packed", PATH.replace("down", "donw"))
