"""What a user may ask for, and what config.json may say."""

import contextlib
import json
import re

import pytest

from pairquant.spec.checkpoint import CheckpointConfig
from pairquant.spec.linear import Spec
from pairquant.spec.options import QuantConfig
from pairquant.spec.patterns import matches
from pairquant.spec.recipe import PRESETS, Recipe, Training, flat, recipe_with
from pairquant.support.errors import CheckpointError, ConfigError

FOREIGN = {"quant_method": "paroquant", "bits": 4, "group_size": 128, "krot": 8, "zero_point": True}


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("preset", "fats", "fast, best, paper, quick, gptq, rtn; did you mean 'fast'?"),
        ("preset", None, "fast, best, paper, quick, gptq, rtn"),
        ("pair_selection", "magnitute", "random, magnitude; did you mean 'magnitude'?"),
        ("bits", 5, "2, 3, 4, 8"),
        ("bits", "int4", "2, 3, 4, 8"),
        ("bits", 4.0, "2, 3, 4, 8"),
        ("bits", True, "2, 3, 4, 8"),
        ("bits", [4], "2, 3, 4, 8"),
        ("group_size", 100, "32, 64, 128, auto"),
        ("group_size", "atuo", "32, 64, 128, auto; did you mean 'auto'?"),
        ("rotations", 17, "whole numbers from 0 to 16"),
        ("rotations", -1, "whole numbers from 0 to 16"),
        ("rotations", 8.0, "whole numbers from 0 to 16"),
        ("rotations", True, "whole numbers from 0 to 16"),
        ("samples", 0, "whole numbers from 1 "),
        ("samples", "128", "whole numbers from 1 "),
        ("seq_len", 1, "whole numbers from 2 "),
        ("seed", -1, "whole numbers from 0 "),
        ("seed", 2**63, "whole numbers from 0 "),
    ],
)
def test_a_bad_option_is_refused_with_its_value_and_what_is_allowed(option, value, allowed):
    with pytest.raises(ConfigError) as caught:
        QuantConfig(**{option: value})
    assert f"{option} is {value!r}" in str(caught.value)
    assert allowed in str(caught.value)


@pytest.mark.parametrize("option", ["symmetric", "share_rotations"])
@pytest.mark.parametrize("value", ["no", 2, None])
def test_a_switch_is_refused_unless_true_or_false(option, value):
    with pytest.raises(ConfigError, match=option):
        QuantConfig(**{option: value})


@pytest.mark.parametrize("option", ["calibration", "ignore"])
def test_a_single_name_is_never_read_as_a_list_of_letters(option):
    with contextlib.suppress(ConfigError):  # refusing it is as good
        assert getattr(QuantConfig(**{option: "lm_head"}), option) == ("lm_head",)


@pytest.mark.parametrize("option", ["calibration", "ignore"])
@pytest.mark.parametrize("value", [3, (3,), None])
def test_a_list_of_names_is_refused_when_it_is_none(option, value):
    with pytest.raises(ConfigError, match=option):
        QuantConfig(**{option: value})


def test_a_broken_regular_expression_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"re:\(mlp.*not a regular expression.*unterminated"):
        QuantConfig(ignore=("lm_head", "re:(mlp"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preset": "rtn", "bits": 2, "group_size": 32},
        {"group_size": "auto", "rotations": 0},
        {"bits": 8, "rotations": 16, "pair_selection": "magnitude", "ignore": ["re:.*experts"], "seed": 2**63 - 1},
    ],
)
def test_allowed_options_are_kept(options):
    config = QuantConfig(**options)
    for name, value in options.items():
        if name != "rotations" or config.recipe.transform:
            assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_preset_gives_the_recipe(preset):
    assert QuantConfig(preset=preset).recipe == PRESETS[preset]


def test_a_given_recipe_overrides_the_preset():
    assert QuantConfig(preset="fast", recipe=Recipe(steps=3)).recipe.steps == 3


@pytest.mark.parametrize("preset", ["gptq", "rtn"])
def test_without_a_transform_there_are_no_rotations(preset):
    assert QuantConfig(preset=preset, rotations=8).rotations == 0


def test_resolving_auto_changes_the_group_size_only():
    config = QuantConfig(group_size="auto", bits=3, seed=7, recipe=Recipe(steps=3))
    assert config.with_group_size(64) == QuantConfig(group_size=64, bits=3, seed=7, recipe=Recipe(steps=3))


def test_quant_config_gives_the_layout_of_a_linear():
    config = QuantConfig(bits=3, group_size=64, rotations=5)
    assert config.layout(128, 96, bias=True) == Spec(3, 64, 5).layout(128, 96, True)


def test_quant_config_comes_back_from_json():
    config = QuantConfig(bits=3, ignore=("lm_head", "re:.*gate"), recipe=Recipe(shrinks=(1.0, 0.9)))
    entries = json.loads(json.dumps(config.to_dict()))
    assert QuantConfig(**entries | {"recipe": Recipe(**entries["recipe"])}) == config


@pytest.mark.parametrize(
    "config",
    [
        CheckpointConfig(Spec(4, 128, 8)),
        CheckpointConfig(Spec(3, 32, 0, symmetric=True)),
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
    assert (config.bits, config.group_size, config.rotations, config.zero_point) == (4, 128, 8, True)
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
        ("bits", 5),
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
    assert CheckpointConfig(Spec(3, 64, 5)).layout(128, 96, bias=True) == Spec(3, 64, 5).layout(128, 96, True)


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("model.lm_head", "lm_head", True),
        ("model.layers.0.mlp.gate", "mlp.gate", True),
        ("model.layers.0.mlp.gate", "model.layers.0.mlp.gate", True),
        ("model.layers.0.mlp.gate", "model.layers.0", True),
        ("visual.blocks.0.attn.qkv", "visual", True),
        ("model.layers.10.mlp.gate", "model.layers.1", False),
        ("model.layers.0.mlp.gate_proj", "gate", False),
        ("model.layers.0.mlp.gate_proj", "mlp", False),
        ("xlm_head", "lm_head", False),
        ("model.layers.0.mlp.gate", "", False),
        ("model.layers.0.mlp.gate", "re:model.*gate$", True),
        ("model.layers.0.mlp.gate", r"re:.*\.mlp\.", True),
        ("model.layers.0.mlp.gate", "re:mlp", False),
        ("model.layers.0.mlp.gate", "model.*gate", False),
    ],
)
def test_ignore_patterns(path, pattern, expected):
    assert matches(path, [pattern]) is expected


def test_one_matching_pattern_is_enough():
    assert matches("lm_head", ["visual", "lm_head"])
    assert not matches("lm_head", [])


def test_settings_change_a_preset():
    recipe = recipe_with("paper", ["training.epochs=3", "shrinks=(1.0,0.9)", "rounding=gptq", "training.weight_rate=1"])
    assert recipe.training == Training(epochs=3, weight_rate=1)
    assert (recipe.shrinks, recipe.rounding) == ((1.0, 0.9), "gptq")
    assert recipe_with("fast", []) == PRESETS["fast"]


@pytest.mark.parametrize(
    ("preset", "setting", "message"),
    [
        ("fast", "stepz=3", "did you mean 'steps'"),
        ("fast", "steps", "did you mean|is none of"),
        ("fast", "training.epochs=3", "is none of: transform"),
        ("fast", "training=3", "is none of: transform"),
        ("fast", "steps=many", "steps is 'many', allowed: a value such as 150"),
        ("paper", "training.loss=l1", "loss is 'l1', allowed: smooth_l1, mse"),
        ("paper", "training.epochs=-1", "epochs is -1"),
        ("papre", "steps=3", "did you mean 'paper'"),
    ],
)
def test_settings_that_are_not_there_or_not_allowed_are_refused(preset, setting, message):
    with pytest.raises(ConfigError, match=message):
        recipe_with(preset, [setting])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_setting_that_is_listed_can_be_set(preset):
    for name, value in flat(PRESETS[preset]).items():
        assert recipe_with(preset, [f"{name}={value}"]) == PRESETS[preset]
