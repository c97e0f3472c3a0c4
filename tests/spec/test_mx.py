"""How weights in MXFP4 are stored: tensors, sizes, faulty values, and what excludes each other."""

import pytest
import torch

from pairquant.spec.linear import LinearLayout, Spec
from pairquant.support.errors import ConfigError

MX = Spec(4, 64, 8, weights="mxfp4")


def test_a_weight_takes_a_quarter_bit_for_scales_whatever_its_groups():
    for group_size in (32, 64, 128):
        layout = Spec(4, group_size, 8, weights="mxfp4").layout(512, 256)
        assert (layout.stored_bits() - layout.transform_bits()) / (512 * 256) == 4.25


def test_no_tensor_but_the_codes_could_be_taken_for_one_of_whole_numbers():
    whole, mx = Spec(4, 32, 8).layout(256, 64).fields(), Spec(4, 32, 8, weights="mxfp4").layout(256, 64).fields()
    assert mx["qweight"] == whole["qweight"]
    assert "qzeros" not in mx
    assert mx["scales"].dtype != whole["scales"].dtype
    assert mx["scales"].shape != whole["scales"].shape


@pytest.mark.parametrize(("exponent", "fault"), [(-23, False), (13, False), (-24, True), (14, True), (128, True)])
def test_exponents_outside_those_of_float16_are_faulty(exponent, fault):
    (codes, _) = MX.parts
    scales = torch.full((4, 32), 127, dtype=torch.uint8)
    scales[2, 5] = 127 + exponent
    found = list(codes.faults({"scales": scales.view(torch.int32)}))
    assert [name for name, _ in found] == ["scales"] * fault
    assert all(f"{exponent}" in text and "allowed: -23 to 13" in text for _, text in found)


def test_sizes_that_do_not_fit_are_told():
    assert MX.layout(96, 12).misfits() == [
        "in_features 96 is not a multiple of group size 64",
        "out_features 12 is not a multiple of 8 (packing at 4 bits)",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "mxfp8"}, "weights is 'mxfp8', allowed: mxfp4; did you mean 'mxfp4'?"),
        ({"weights": "mxfp4", "bits": 3}, "bits of mxfp4 weights is 3, allowed: 4"),
        ({"weights": "mxfp4", "symmetric": True}, "symmetric is True, allowed with mxfp4 weights: False"),
    ],
)
def test_what_excludes_each_other_is_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        Spec(**options)
    assert message in str(caught.value)


def test_operators_are_told_of_it():
    layout = Spec(4, 64, 8, activations="mxfp4", weights="mxfp4").layout(128, 64)
    assert LinearLayout.of_numbers(layout.numbers()) == layout
    assert str(layout.spec) == "mxfp4 weights, groups of 64, 8 rotations, mxfp4 activations"
