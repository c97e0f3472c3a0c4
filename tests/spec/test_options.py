"""What a user may ask for."""

import contextlib
import json

import pytest

from pairquant.spec.mixed import Candidates, Target
from pairquant.spec.options import ROTATED, Override, QuantConfig
from pairquant.spec.recipe import PRESETS, HeadTraining, Recipe, Refit, Training, recipe_with
from pairquant.support.errors import ConfigError

FOREIGN = {"quant_method": "paroquant", "bits": 4, "group_size": 128, "krot": 8, "zero_point": True}


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("preset", "fats", "fast, best, paper, quick, gptq, rtn; did you mean 'fast'?"),
        ("preset", None, "fast, best, paper, quick, gptq, rtn"),
        ("pair_selection", "magnitute", "random, magnitude; did you mean 'magnitude'?"),
        ("bits", 7, "2, 3, 4, 5, 6, 8"),
        ("bits", "int4", "2, 3, 4, 5, 6, 8"),
        ("bits", 4.0, "2, 3, 4, 5, 6, 8"),
        ("bits", True, "2, 3, 4, 5, 6, 8"),
        ("bits", [4], "2, 3, 4, 5, 6, 8"),
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


@pytest.mark.parametrize("option", ["symmetric", "share_rotations", "all_experts", "transform_per_expert"])
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
        if name != "rotations" or config.recipe.fits_transform:
            assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_preset_gives_the_recipe(preset):
    assert QuantConfig(preset=preset).recipe == PRESETS[preset]


def test_all_experts_needs_a_preset_that_reads_text():
    assert QuantConfig(preset="gptq", all_experts=True).all_experts
    with pytest.raises(ConfigError, match="all_experts is True.*'rtn'.*without any text"):
        QuantConfig(preset="rtn", all_experts=True)


@pytest.mark.parametrize("preset", ["gptq", "rtn"])
def test_a_transform_per_expert_needs_a_preset_that_fits_one(preset):
    made = QuantConfig(transform_per_expert=True)
    assert QuantConfig.from_dict(made.to_dict()) == made
    assert "transform_per_expert" not in QuantConfig().to_dict()
    with pytest.raises(ConfigError, match=f"transform_per_expert is True.*'{preset}'.*fits no transform"):
        QuantConfig(preset=preset, transform_per_expert=True)


def test_a_given_recipe_overrides_the_preset():
    assert QuantConfig(preset="fast", recipe=Recipe(steps=3)).recipe.steps == 3


@pytest.mark.parametrize("preset", ["gptq", "rtn"])
def test_without_a_transform_there_are_no_rotations(preset):
    assert QuantConfig(preset=preset, rotations=8).rotations == 0


def test_rotations_auto_is_a_target_of_few_transforms():
    found = QuantConfig(rotations="auto")
    assert (found.rotations, found.target, found.recipe.scales_alone) == (8, Target(rotated=ROTATED), False)
    assert found.candidates == Candidates((), (), (0, 8))
    assert QuantConfig.from_dict(found.to_dict()) == found
    sized = QuantConfig(rotations="auto", target=Target(3.5), candidates="bits:3|4,rotations:0|4")
    assert sized.target == Target(3.5, rotated=ROTATED)
    assert sized.candidates == Candidates((3, 4), (), (0, 4))
    assert QuantConfig(preset="gptq", rotations="auto").target is None, "it fits no transform anyway"
    with pytest.raises(ConfigError, match="no size is wanted that would decide"):
        QuantConfig(rotations="auto", candidates="bits:3|4")
    with pytest.raises(ConfigError, match="rotations is 'some', allowed: whole numbers from 0 to 16, or auto"):
        QuantConfig(rotations="some")


def test_resolving_auto_changes_the_group_size_only():
    config = QuantConfig(group_size="auto", bits=3, seed=7, recipe=Recipe(steps=3))
    assert config.with_group_size(64) == QuantConfig(group_size=64, bits=3, seed=7, recipe=Recipe(steps=3))


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3, "ignore": ("lm_head", "re:.*gate"), "recipe": Recipe(shrinks=(1.0, 0.9))},
        {"preset": "paper"},
        {"preset": "best", "overrides": ("down_proj=bits:8", "re:.*q_proj$=group_size:32,rotations:0")},
        {"recipe": Recipe(training=Training(epochs=3), refit=Refit(batch=2))},
        {"head_bits": 4, "recipe": Recipe(head=HeadTraining(steps=3, floor=0.1))},
        {"head_bits": 4, "recipe": Recipe(head=HeadTraining(steps=0, floor=0.1))},
    ],
    ids=str,
)
def test_quant_config_comes_back_from_json(options):
    config = QuantConfig(**options)
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("head_bits", [None, 8])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_record_from_before_the_training_of_the_output_embedding_is_what_would_be_written_now(preset, head_bits):
    config = QuantConfig(preset=preset, head_bits=head_bits)
    record = config.to_dict()
    settings = {
        "fits_transform", "channel_scales", "scales_alone", "training", "refit", "end_to_end", "steps", "learning_rate",
        "final_rate", "rounding", "damping", "by_activation", "shrinks", "sweeps", "refit_scales", "drift",
    }  # fmt: skip
    assert set(record["recipe"]) == settings
    read = QuantConfig.from_dict(json.loads(json.dumps(record)))
    assert read == config
    assert not read.recipe.head.steps


def test_a_training_of_the_output_embedding_needs_its_codes_and_text():
    with pytest.raises(
        ConfigError, match=r"head.steps is 200, but the output embedding is not quantized.*Add --head-bits"
    ):
        QuantConfig(preset="best", recipe=recipe_with("best", ["head.steps=200"]))
    with pytest.raises(ConfigError, match=r"head.steps is 200, allowed with preset 'rtn': 0"):
        QuantConfig(preset="rtn", head_bits=4, recipe=recipe_with("rtn", ["head.steps=200"]))
    for preset, epochs in [(name, 0) for name in PRESETS if name != "rtn"] + [("rtn", 1)]:
        recipe = recipe_with(preset, ["head.steps=200"], epochs)
        assert QuantConfig(preset=preset, head_bits=4, recipe=recipe).to_dict()["recipe"]["head"]["steps"] == 200


def test_an_unknown_entry_of_a_saved_config_is_named():
    with pytest.raises(ConfigError, match=r"'bitz' is not known; did you mean 'bits'"):
        QuantConfig.from_dict({"bitz": 4})
    with pytest.raises(ConfigError, match=r"recipe cannot be read.*stepz"):
        QuantConfig.from_dict({"recipe": {"stepz": 4}})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("down_proj=bits:8", Override("down_proj", bits=8)),
        ("re:.*(q|k)=x$=bits:8, group_size:64,rotations:0", Override("re:.*(q|k)=x$", 8, 64, 0)),
        ("model.layers.0=rotations:2", Override("model.layers.0", rotations=2)),
    ],
)
def test_an_override_is_read_from_text_and_written_as_such(text, expected):
    assert Override.parse(text) == expected
    assert Override.parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("down_proj", "has no '='"),
        ("=bits:8", "has no '='"),
        ("down_proj=", "is none of bits:2|3|4|5|6|8"),
        ("down_proj=bit:8", "did you mean 'bits'?"),
        ("down_proj=bits:8,bits:4", "is none of"),
        ("down_proj=bits:x", "'bits:x' is none of"),
        ("down_proj=bits:7", "bits is 7, allowed: 2, 3, 4, 5, 6, 8"),
        ("down_proj=group_size:48", "group_size is 48, allowed: 32, 64, 128"),
        ("re:(=bits:8", "override pattern 're:(' is not a regular expression"),
    ],
)
def test_an_override_that_makes_no_sense_says_what_is_allowed(text, said):
    with pytest.raises(ConfigError) as caught:
        QuantConfig(overrides=(text,))
    assert said in str(caught.value)


def test_an_override_that_is_no_text_is_refused():
    with pytest.raises(ConfigError, match="override is 3, allowed: PATTERN="):
        QuantConfig(overrides=(3,))
    with pytest.raises(ConfigError, match="changes nothing"):
        Override("down_proj")
