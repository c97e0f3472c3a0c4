"""Tuning the kernels for a checkpoint: which shapes, in which order, and what is refused before anything is measured."""

import pytest
import torch
from tiny_models import save_tiny

import pairquant
from pairquant.jobs import tune as job
from pairquant.jobs.tune import launched_shapes, tune
from pairquant.kernels import availability
from pairquant.kernels.run import table
from pairquant.kernels.run import tune as measuring
from pairquant.kernels.run.table import Dense
from pairquant.support.errors import ResourceError, SourceError


@pytest.mark.parametrize(
    ("linears", "shapes"),
    [
        (
            {
                **{f"a.{name}_proj": (64, 128) for name in "qkv"}, "a.o_proj": (128, 64),
                "m.gate_proj": (8, 16), "m.up_proj": (8, 16),
            },
            [((64, 64, 64), 128), ((128,), 64), ((8, 8), 16)],
        ),
        ({"a.q_proj": (64, 128), "a.k_proj": (32, 96)}, [((64,), 128), ((32,), 96)]),
        ({"a.gate_proj": (8, 16), "a.up_proj": (8, 32)}, [((8,), 16), ((8,), 32)]),
        ({"0.gate_proj": (8, 16), "1.up_proj": (8, 16)}, [((8,), 16)]),
        ({"lm_head": (100, 16)}, [((100,), 16)]),
        ({f"{block}.o_proj": (8, 16) for block in range(9)}, [((8,), 16)]),
    ],
    ids=["siblings", "no third sibling", "siblings of two widths", "no siblings", "the head", "the same in each block"],
)  # fmt: skip
def test_each_distinct_launch_is_a_shape_siblings_together(linears, shapes):
    assert launched_shapes(linears) == shapes


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine that seems to have a GPU: what is measured on it, and the table that it is written to."""
    measured = []

    def tune_shape(sizes, channels, group_size, device, bits):
        measured.append((sizes, channels, group_size, device, bits))
        return {1: Dense(len(measured))}

    monkeypatch.setattr(job, "resolve_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(availability, "triton_missing", lambda: None)
    monkeypatch.setattr("pairquant.backends.triton_kernels.triton_missing", lambda: None)
    monkeypatch.setattr(availability, "device_class", lambda device: "sm99")
    monkeypatch.setattr(measuring, "tune_shape", tune_shape)
    monkeypatch.setattr(table.Path, "home", lambda: tmp_path / "home")
    table.user_table.cache_clear()
    table._choices.cache_clear()
    yield measured
    table.user_table.cache_clear()
    table._choices.cache_clear()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Bits → a packed checkpoint."""
    root = tmp_path_factory.mktemp("tune")
    source = save_tiny(root / "source")
    for bits in (4, 3):
        config = pairquant.QuantConfig(preset="rtn", bits=bits, group_size=64, rotations=2)
        pairquant.quantize(source, root / str(bits), config, device="cpu")
    return root


def test_each_shape_is_kept_as_soon_as_it_is_measured(gpu, checkpoints):
    for done, (sizes, channels, choices) in enumerate(tune(checkpoints / "4"), 1):
        assert len(gpu) == done
        assert gpu[-1] == (sizes, channels, 64, torch.device("cuda", 0), 4)
        assert table.choose("sm99", sum(sizes), channels, 1) == choices[1] == Dense(done)
    assert {row[:2] for row in gpu} == {((128, 64, 64), 128), ((128,), 128), ((192, 192), 128), ((128,), 192)}
    assert len(gpu) == 4


def test_layers_are_measured_at_their_own_width(gpu, checkpoints):
    list(tune(checkpoints / "3"))
    assert {row[4] for row in gpu} == {3}


def test_a_model_that_is_not_there_is_named(gpu, tmp_path):
    with pytest.raises(SourceError, match="nowhere"):
        next(tune(tmp_path / "nowhere"))


def test_without_triton_nothing_is_measured(gpu, checkpoints, monkeypatch):
    monkeypatch.setattr(availability, "triton_missing", lambda: "it is not installed")
    with pytest.raises(ResourceError, match="needs Triton: it is not installed"):
        next(tune(checkpoints / "4"))


def test_without_a_gpu_nothing_is_read():
    with pytest.raises(ResourceError, match="needs an NVIDIA GPU, and none was found"):
        next(tune("anything", device="cpu"))
