"""The transform's part of the stored form: its tensors, and the values that are faulty."""

import pytest
import torch

from pairquant.spec.fields import CHANNELS, Size
from pairquant.spec.rotation import Rotation

PART = Rotation(rotations=2, group_size=32)


@pytest.fixture
def tensors():
    filled = {name: torch.ones(f.shape, dtype=f.dtype) for name, f in PART.fields(Size(64, 8)).items()}
    filled["pairs"] = torch.arange(32, dtype=torch.int16).repeat(2, 2)
    return filled


def test_every_tensor_counts_channels_and_none_counts_rows():
    for size in (Size(64, 8), Size(64, 800)):
        fields = PART.fields(size)
        assert {name: field.shape for name, field in fields.items()} == {
            "theta": (2, 32), "pairs": (2, 64), "channel_scales": (1, 64),
        }  # fmt: skip
        assert all(field.axes == (None, CHANNELS) for field in fields.values())


def test_sound_values_have_no_faults(tensors):
    assert list(PART.faults(tensors)) == []
    assert list(Rotation(0, 32).faults({**tensors, "theta": tensors["theta"][:0], "pairs": tensors["pairs"][:0]})) == []


@pytest.mark.parametrize(
    ("name", "place", "value", "said"),
    [
        ("theta", (1, 3), float("nan"), "not finite"),
        ("channel_scales", (0, 3), float("inf"), "not finite"),
        ("channel_scales", (0, 3), 0, "zeros"),
        ("pairs", (1, 3), 32, "channel 32, outside 0 to 31"),
        ("pairs", (0, 3), -1, "channel -1"),
        ("pairs", (0, 3), 4, "twice"),
    ],
)
def test_each_fault_is_named(tensors, name, place, value, said):
    tensors[name][place] = value
    (fault, *_) = PART.faults(tensors)
    assert fault[0] == name
    assert said in fault[1]
