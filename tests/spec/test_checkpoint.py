"""What config.json may say of a checkpoint."""

import json
import re

import pytest

from pairquant.spec.checkpoint import CheckpointConfig
from pairquant.spec.linear import Spec
from pairquant.support.errors import CheckpointError

FOREIGN = {"quant_method": "paroquant", "bits": 4, "group_size": 128, "krot": 8, "zero_point": True}


@pytest.mark.parametrize(
    "config",
    [
        CheckpointConfig(Spec(4, 128, 8)),
        CheckpointConfig(Spec(3, 32, 0, symmetric=True)),
        CheckpointConfig(
            Spec(4, 64, 8, activations="int8"),
            ((r"^a\.q_proj$", Spec(4, 64, 8)), (r"^a\.k_proj$", Spec(8, 64, 8, activations="mxfp4"))),
        ),
        CheckpointConfig(
            Spec(4, 128, 8),
            modules_to_not_convert=("lm_head",),
            shared_rotations=(("a.q_proj", "a.k_proj"), ("a.gate_proj", "a.up_proj")),
            provenance={"preset": "fast", "seed": 0, "calibration": ["default"], "nested": {"digest": "ab"}},
        ),
    ],
)
def test_checkpoint_config_comes_back_from_json(config):
    assert CheckpointConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_checkpoint_config_writes_the_keys_that_every_reader_knows():
    written = CheckpointConfig(Spec(4, 64, 0)).to_dict()
    assert written == {"quant_method": "paroquant", "bits": 4, "group_size": 64, "krot": 0}


def test_checkpoint_config_says_when_there_is_no_zero_point():
    assert CheckpointConfig(Spec(4, 64, 8, symmetric=True)).to_dict()["zero_point"] is False


def test_unconverted_modules_are_also_named_exactly_for_gptqmodel():
    written = CheckpointConfig(Spec(4, 128, 8), modules_to_not_convert=("model.layers.1.mlp.gate", "lm_head")).to_dict()
    paths = [
        "model.layers.1.mlp.gate",
        "lm_head",
        "model.layers.1.mlp.gate_proj",
        "model.layers.11.mlp.gate",
        "lm-head",
    ]
    patterns = [key.removeprefix("-:") for key in written["dynamic"]]
    assert [any(re.match(pattern, path) for pattern in patterns) for path in paths] == [True, True, False, False, False]


def test_a_foreign_config_with_the_four_keys_reads():
    config = CheckpointConfig.from_dict(FOREIGN)
    assert config.spec == Spec(4, 128, 8, symmetric=False)
    assert config.modules_to_not_convert == config.shared_rotations == ()
    assert config.provenance is None


def test_entries_of_other_tools_are_ignored():
    assert CheckpointConfig.from_dict(FOREIGN | {"version": "gemm", "rotations": "many"}) == CheckpointConfig(
        Spec(4, 128, 8)
    )


@pytest.mark.parametrize("entry", ["bits", "group_size", "krot"])
def test_a_missing_entry_is_named_as_the_file_calls_it(entry):
    entries = {key: value for key, value in FOREIGN.items() if key != entry}
    with pytest.raises(CheckpointError, match=f"'{entry}'"):
        CheckpointConfig.from_dict(entries)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("bits", 7),
        ("bits", "4"),
        ("bits", 4.0),
        ("bits", None),
        ("group_size", 100),
        ("group_size", 128.0),
        ("group_size", -1),
        ("krot", 17),
        ("krot", -1),
        ("krot", 8.0),
        ("krot", True),
        ("krot", None),
        ("zero_point", "true"),
        ("zero_point", 1),
        ("modules_to_not_convert", "lm_head"),
        ("modules_to_not_convert", {"lm_head": True}),
        ("shared_rotations", "q_proj"),
        ("provenance", "pairquant 1"),
    ],
)
def test_a_damaged_entry_is_named_with_its_value(entry, value):
    with pytest.raises(CheckpointError) as caught:
        CheckpointConfig.from_dict(FOREIGN | {entry: value})
    assert f"quantization_config.{entry} is {value!r}, must be" in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "value"),
    [("modules_to_not_convert", ["lm_head", 3]), ("shared_rotations", [["a", "b"], "c"]), ("shared_rotations", [[1]])],
)
def test_a_damaged_list_is_named(entry, value):
    with pytest.raises(CheckpointError, match=f"quantization_config.{entry} is .* must be a list"):
        CheckpointConfig.from_dict(FOREIGN | {entry: value})


@pytest.mark.parametrize("entries", [None, [], "paroquant", {}, {"quant_method": "awq", "bits": 4}])
def test_another_quantization_method_is_refused(entries):
    with pytest.raises(CheckpointError, match=r"quant_method is .* must be 'paroquant'"):
        CheckpointConfig.from_dict(entries)


def test_checkpoint_config_gives_the_layout_of_a_linear():
    assert CheckpointConfig(Spec(3, 64, 5)).layout("a", 128, 96, bias=True) == Spec(3, 64, 5).layout(128, 96, True)


DYNAMIC = {
    r"+:^model\.layers\.0\.down_proj$": {"bits": 8, "group_size": 64, "krot": 0},
    r".*\.up_proj$": {"bits": 6},
    r"-:^lm_head$": {},
    r"+:.*layers\.0\..*": {"krot": 2},
}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model.layers.0.down_proj", Spec(8, 64, 0)),
        ("model.layers.0.up_proj", Spec(6, 128, 8)),
        ("model.layers.0.q_proj", Spec(4, 128, 2)),
        ("model.layers.1.q_proj", Spec(4, 128, 8)),
    ],
)
def test_the_first_pattern_of_dynamic_that_matches_counts(path, expected):
    assert CheckpointConfig.from_dict(FOREIGN | {"dynamic": DYNAMIC}).spec_of(path) == expected


def test_overrides_come_back_from_json_and_say_only_what_differs():
    config = CheckpointConfig(
        Spec(4, 64, 8), ((r"^a\.up$", Spec(5, 64, 8)), (r"^a\.down$", Spec(4, 32, 0))), ("lm_head",)
    )
    entries = json.loads(json.dumps(config.to_dict()))
    assert entries["dynamic"] == {
        r"+:^a\.up$": {"bits": 5}, r"+:^a\.down$": {"group_size": 32, "krot": 0}, "-:^lm_head$": {},
    }  # fmt: skip
    assert CheckpointConfig.from_dict(entries) == config


@pytest.mark.parametrize(
    ("dynamic", "said"),
    [
        ([], "dynamic is"),
        ({"+:^a$": 3}, r"dynamic\['\+:\^a\$'\] is 3"),
        ({"+:(": {"bits": 8}}, "a regular expression"),
        ({"+:^a$": {"bits": 7}}, r"bits is 7, must be one of"),
        ({"+:^a$": {"krot": True}}, "krot is True"),
    ],
)
def test_a_damaged_override_is_named(dynamic, said):
    with pytest.raises(CheckpointError, match=said):
        CheckpointConfig.from_dict(FOREIGN | {"dynamic": dynamic})


def test_activations_are_named_only_where_they_are_rounded():
    written = CheckpointConfig(Spec(4, 64, 8, activations="fp8"), (("^a$", Spec(4, 64, 8)),)).to_dict()
    assert written["activations"] == "fp8"
    assert written["dynamic"] == {"+:^a$": {"activations": None}}
    assert (
        "activations" not in CheckpointConfig(Spec(4, 64, 8), (("^a$", Spec(3, 64, 8)),)).to_dict()["dynamic"]["+:^a$"]
    )


@pytest.mark.parametrize("value", ["int16", 8, ["int8"], True])
def test_activations_that_are_not_known_are_refused(value):
    with pytest.raises(CheckpointError, match="quantization_config.activations is .*int8, fp8, int4, mxfp4, or null"):
        CheckpointConfig.from_dict({**FOREIGN, "activations": value})
