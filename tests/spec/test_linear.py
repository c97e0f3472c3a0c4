"""The stored layout: shapes, sizes, and the check of every tensor that is read."""

import pytest
import torch

from pairquant.core.packing import pack, unpack
from pairquant.spec.codes import AWQ_ORDER, SUPPORTED_BITS, columns_per_block
from pairquant.spec.fields import finite
from pairquant.spec.linear import TENSOR_NAMES, PackedLinear, Spec
from pairquant.support.errors import CheckpointError

PATH = "model.layers.0.mlp.up_proj"
LAYOUT = Spec(4, 64, 2).layout(128, 64, True)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """An undamaged set for `LAYOUT`."""
    filled = {name: torch.ones(field.shape, dtype=field.dtype) for name, field in LAYOUT.fields().items()}
    filled["pairs"] = torch.arange(64, dtype=torch.int16).repeat(2, 2)
    return filled


@pytest.mark.parametrize(("bits", "columns"), [(2, 16), (3, 32), (4, 8), (5, 32), (6, 16), (8, 4)])
def test_a_block_of_columns_fills_whole_words(bits, columns):
    assert columns_per_block(bits) == columns


def test_awq_order_names_each_column_once():
    assert sorted(AWQ_ORDER) == list(range(8))


def test_fields_follow_the_format_table():
    described = {name: (field.dtype, field.shape) for name, field in LAYOUT.fields().items()}
    assert described == {
        "qweight": (torch.int32, (128, 8)),
        "qzeros": (torch.int32, (2, 8)),
        "scales": (torch.float16, (2, 64)),
        "theta": (torch.float16, (2, 64)),
        "pairs": (torch.int16, (2, 128)),
        "channel_scales": (torch.float16, (1, 128)),
        "bias": (torch.float16, (64,)),
    }
    assert tuple(described) == TENSOR_NAMES


def test_fields_have_no_bias_unless_the_linear_has_one():
    assert "bias" not in Spec(4, 64, 2).layout(128, 64).fields()


@pytest.mark.parametrize(("bits", "words"), [(2, 4), (3, 6), (4, 8), (5, 10), (6, 12), (8, 16)])
def test_codes_take_their_bits_and_no_more(bits, words):
    fields = Spec(bits, 64, 2).layout(128, 64).fields()
    assert fields["qweight"].shape == (128, words)
    assert fields["qzeros"].shape == (2, words)


def test_stored_bits_counts_every_tensor_but_the_bias():
    codes, zeros, scales = 128 * 64 * 4, 1 * 64 * 4, 1 * 64 * 16
    angles, pairs, channel_scales = 8 * 64 * 16, 8 * 128 * 16, 128 * 16
    for bias in (False, True):
        layout = Spec(4, 128, 8).layout(128, 64, bias)
        assert layout.stored_bits() == codes + zeros + scales + angles + pairs + channel_scales == 60672


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (Spec(4, 128, 8).layout(128, 64), []),
        (Spec(4, 32, 0).layout(160, 64), []),
        (Spec(4, 128, 8).layout(160, 64), [("in_features 160", "128")]),
        (Spec(4, 128, 8).layout(128, 60), [("out_features 60", "8", "4 bits")]),
        (Spec(3, 128, 8).layout(128, 72), [("out_features 72", "32", "3 bits")]),
        (Spec(8, 64, 8).layout(100, 6), [("in_features 100", "64"), ("out_features 6", "4", "8 bits")]),
    ],
)
def test_misfits_name_the_size_and_what_it_must_divide_by(layout, said):
    faults = layout.misfits()
    assert len(faults) == len(said)
    for fault, parts in zip(faults, said, strict=True):
        assert all(part in fault for part in parts)


def test_undamaged_tensors_come_back_as_given(tensors):
    packed = PackedLinear.from_tensors(PATH, LAYOUT, tensors)
    assert packed.tensors.keys() == tensors.keys()
    assert all(packed.tensors[name] is tensors[name] for name in tensors)


def test_a_layout_without_rotations_needs_no_pairs_inside(tensors):
    layout = Spec(4, 64, 0).layout(128, 64)
    del tensors["bias"]
    tensors["theta"], tensors["pairs"] = tensors["theta"][:0], tensors["pairs"][:0]
    assert PackedLinear.from_tensors(PATH, layout, tensors).bias is None


@pytest.mark.parametrize("name", TENSOR_NAMES)
def test_a_missing_tensor_is_named(tensors, name):
    del tensors[name]
    _refused(tensors, name, "missing")


@pytest.mark.parametrize("name", TENSOR_NAMES)
def test_a_wrong_dtype_is_named_with_the_right_one(tensors, name):
    right = str(tensors[name].dtype).removeprefix("torch.")
    tensors[name] = tensors[name].to(torch.float64)
    _refused(tensors, name, "float64", right)


@pytest.mark.parametrize("name", TENSOR_NAMES)
def test_a_wrong_shape_is_named_with_the_right_one(tensors, name):
    right = list(tensors[name].shape)
    tensors[name] = tensors[name][..., :-2]
    _refused(tensors, name, str(list(tensors[name].shape)), str(right))


@pytest.mark.parametrize("name", ["scales", "theta", "channel_scales", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(tensors, name, value):
    tensors[name].view(-1)[3] = value
    _refused(tensors, name, "finite")


@pytest.mark.parametrize("channel", [64, -1, 127])
def test_a_pair_outside_its_group_is_refused(tensors, channel):
    tensors["pairs"][1, 70] = channel
    _refused(tensors, "pairs", str(channel), "63")


def test_a_channel_in_two_pairs_of_one_rotation_is_refused(tensors):
    tensors["pairs"][1, 70] = tensors["pairs"][1, 71]
    _refused(tensors, "pairs", "twice")


def test_a_zero_channel_scale_is_refused(tensors):
    tensors["channel_scales"][0, 5] = 0
    _refused(tensors, "channel_scales", "zero")


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_thinned_keeps_every_third_block_of_rows(bits, generator):
    block = columns_per_block(bits)
    layout = Spec(bits, 32, 0).layout(64, 8 * block, True)
    codes = torch.randint(0, 2**bits, (64, 8 * block), generator=generator).to(torch.uint8)
    zeros = torch.randint(0, 2**bits, (2, 8 * block), generator=generator).to(torch.uint8)
    plain = {name: torch.rand(f.shape, generator=generator).to(f.dtype) for name, f in layout.fields().items()}
    linear = PackedLinear(layout, {**plain, "qweight": pack(codes, bits), "qzeros": pack(zeros, bits)})
    kept = torch.cat([torch.arange(start * block, (start + 1) * block) for start in (0, 3, 6)])
    thin = linear.thinned(3)
    assert thin.layout == Spec(bits, 32, 0).layout(64, 3 * block)
    assert thin.bias is None
    assert torch.equal(unpack(thin["qweight"], bits), codes[:, kept])
    assert torch.equal(unpack(thin["qzeros"], bits), zeros[:, kept])
    assert torch.equal(thin["scales"], linear["scales"][:, kept])
    assert thin.shares_transform_with(linear)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 9_999])
def test_one_value_that_is_not_finite_is_found(dtype, value, place):
    tensor = torch.randn(10_000).to(dtype)
    assert finite(tensor)
    tensor[place] = value
    assert not finite(tensor)


def test_nothing_and_whole_numbers_are_finite():
    assert finite(torch.empty(0))
    assert finite(torch.arange(3))


def _refused(tensors, name, *parts):
    with pytest.raises(CheckpointError) as caught:
        PackedLinear.from_tensors(PATH, LAYOUT, tensors)
    assert all(part in str(caught.value) for part in (f"{PATH}.{name} ", *parts)), str(caught.value)
