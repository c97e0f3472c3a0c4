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


@pytest.fixture
def tokens():
    return torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(5))
