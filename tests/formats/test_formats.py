"""Each format against an independent reader of what it stores: the weight that comes back is ours."""

import itertools

import pytest
import torch
from format_readers import READERS

from pairquant.core.grids import WholeGrid
from pairquant.core.linear import Transform, assemble, rotated_weight
from pairquant.formats.base import Contents
from pairquant.formats.table import FORMATS
from pairquant.spec.linear import Spec
from pairquant.support.errors import ConfigError


def packed_of(bits, group_size=32, symmetric=False, rows=64, channels=128, seed=0):
    """A weight without a transform and with codes, zero points and scales of all sorts."""
    generator = torch.Generator().manual_seed(seed)
    layout = Spec(bits, group_size, 0, symmetric).layout(channels, rows)
    codes = torch.randint(0, 2**bits, (rows, channels), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (rows, channels // group_size), generator=generator).float()
    zero = torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero
    scale = (torch.rand(zero.shape, generator=generator) * 0.1 + 0.001).half().float()
    none = Transform.build(
        torch.zeros(0, channels // 2), torch.zeros(0, channels, dtype=torch.int16), torch.ones(channels), group_size
    )
    return assemble(layout, none, codes, WholeGrid(scale, zero, bits), None)


CASES = [
    (name, bits, size, symmetric)
    for name, form in FORMATS.items()
    for bits, size, symmetric in itertools.product(form.bits, (32, 64, 128), (False, True))
    if not (name == "gguf" and bits == 8 and not symmetric)
]


@pytest.mark.parametrize(("name", "bits", "group_size", "symmetric"), CASES)
def test_a_reader_gets_the_weight(name, bits, group_size, symmetric):
    packed, form = packed_of(bits, group_size, symmetric), FORMATS[name]
    assert form.refusal(packed.layout) is None
    entries = form.entries(Contents({"layer": packed.layout}))
    config = entries.get("quantization_config") or entries.get("quantization")
    weight = READERS[name](form.tensors(packed), config, packed)
    expected = rotated_weight(packed)
    rounded = 0 if name in ("awq", "gptq", "compressed-tensors") or (symmetric and name == "gguf") else 1e-3
    largest = expected.abs().max() + 2**bits * packed["scales"].max()  # formats with a minimum round it to float16
    assert (weight - expected).abs().max() <= rounded * largest / 2


@pytest.mark.parametrize(("name", "bits", "group_size", "symmetric"), CASES)
def test_fields_are_known_before_any_data(name, bits, group_size, symmetric):
    packed, form = packed_of(bits, group_size, symmetric), FORMATS[name]
    found = {n: (t.dtype, tuple(t.shape)) for n, t in form.tensors(packed).items()}
    assert {n: (f.dtype, f.shape) for n, f in form.fields(packed.layout).items()} == found


def test_what_a_format_does_not_hold_is_named():
    rotated = Spec(4, 32, 8).layout(64, 64)
    for name, form in FORMATS.items():
        with pytest.raises(ConfigError, match=f"q_proj has 8 rotations, so it cannot be stored as {name}"):
            form.require(Contents({"q_proj": rotated}))
    with pytest.raises(ConfigError, match="has 3 bits, awq holds 4"):
        FORMATS["awq"].require(Contents({"q_proj": Spec(3, 32, 0).layout(64, 64)}))
    with pytest.raises(ConfigError, match="8 bits with zero points"):
        FORMATS["gguf"].require(Contents({"q_proj": Spec(8, 32, 0).layout(64, 64)}))


def test_one_form_for_all_where_a_format_has_no_other():
    layouts = {"a": Spec(4, 32, 0).layout(64, 64), "b": Spec(4, 64, 0).layout(64, 64)}
    for name in ("awq", "gptq"):
        with pytest.raises(ConfigError, match="b is stored with 4 bits, groups of 64.*one form for all"):
            FORMATS[name].require(Contents(layouts))
    for name in ("compressed-tensors", "mlx", "gguf"):
        FORMATS[name].require(Contents(layouts))


def test_layers_of_another_form_are_named_to_the_readers():
    layouts = {
        "a": Spec(4, 32, 0).layout(64, 64),
        "b": Spec(4, 32, 0).layout(64, 64),
        "c.d": Spec(8, 64, 0).layout(64, 64),
    }
    groups = FORMATS["compressed-tensors"].entries(Contents(layouts, ("head",)))["quantization_config"]
    assert groups["config_groups"]["group_0"]["targets"] == ["re:^c\\.d$"]
    assert groups["config_groups"]["group_0"]["weights"]["num_bits"] == 8
    assert groups["config_groups"]["group_1"]["targets"] == ["Linear"]
    assert groups["ignore"] == ["head"]
    mlx = FORMATS["mlx"].entries(Contents(layouts))["quantization"]
    assert mlx["bits"] == 4
    assert mlx["c.d"] == {"group_size": 64, "bits": 8, "mode": "affine"}
