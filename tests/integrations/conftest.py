"""One tiny quantized LLaMA for all tests of what runs models."""

import pytest
import torch
from tiny_models import TEXT, save_tiny

import pairquant


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    config = pairquant.QuantConfig(
        preset="quick", group_size=32, rotations=2, samples=4, seq_len=32, calibration=(str(TEXT),)
    )
    pairquant.quantize(save_tiny(root / "source"), root / "checkpoint", config, device="cpu")
    return root / "checkpoint"


@pytest.fixture(scope="session")
def rounding_checkpoint(tmp_path_factory):
    """A tiny LLaMA, rounded to nearest, whose layers round what they read."""
    root = tmp_path_factory.mktemp("rounding")
    config = pairquant.QuantConfig(preset="rtn", group_size=32, activations="int8")
    pairquant.quantize(save_tiny(root / "source"), root / "checkpoint", config, device="cpu")
    return root / "checkpoint"


@pytest.fixture
def tokens():
    return torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(5))
