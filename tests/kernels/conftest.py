import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` gives NaN: an element that no kernel wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
