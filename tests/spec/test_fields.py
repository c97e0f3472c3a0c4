"""Fields: sizes in bytes, and what their dimensions count."""

import torch

from pairquant.spec.fields import CHANNELS, ROWS, Field, damaged, short


def test_a_field_knows_its_bytes_and_axes():
    field = Field(torch.float16, (3, 5), (CHANNELS, ROWS))
    assert field.nbytes == 30
    assert (field.axis(CHANNELS), field.axis(ROWS)) == (0, 1)
    assert Field(torch.int8, (4,)).axis(ROWS) is None


def test_axes_are_no_part_of_what_a_tensor_is():
    assert Field(torch.int8, (4,), (ROWS,)) == Field(torch.int8, (4,))


def test_a_fault_names_the_tensor_and_the_remedy():
    assert "tensor a.scales is missing" in str(damaged("a.scales", "is missing"))
    assert "quantize it again" in str(damaged("a.scales", "is missing"))
    assert short(torch.bfloat16) == "bfloat16"
