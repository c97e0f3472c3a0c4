"""Recipes, and settings that change a preset."""

from dataclasses import asdict

import pytest

from pairquant.spec.recipe import PRESETS, Recipe, Training, flat, recipe_with
from pairquant.support.errors import ConfigError


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
        ("fast", "training.epochs=3", "is none of: fits_transform"),
        ("fast", "training=3", "is none of: fits_transform"),
        ("fast", "steps=many", "steps is 'many', allowed: a value such as 150"),
        ("paper", "training.loss=l1", "loss is 'l1', allowed: smooth_l1, mse"),
        ("paper", "training.epochs=-1", "epochs is -1"),
        ("fast", "head.final_rate=2", "final_rate is 2, allowed: numbers from 0 to 1$"),
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


@pytest.mark.parametrize(
    ("preset", "needs_text", "compares", "trains"),
    [
        ("fast", True, True, False),
        ("best", True, True, True),
        ("paper", True, True, True),
        ("quick", True, False, False),
        ("gptq", True, False, False),
        ("rtn", False, False, False),
    ],
)
def test_a_recipe_says_what_it_looks_at(preset, needs_text, compares, trains):
    recipe = PRESETS[preset]
    assert (recipe.needs_text, recipe.compares, recipe.trains) == (needs_text, compares, trains)


def test_a_training_of_the_whole_model_is_switched_on_and_then_set():
    recipe = recipe_with("rtn", ["end_to_end.scale_rate=0.5"], end_to_end=2)
    assert (recipe.end_to_end.epochs, recipe.end_to_end.scale_rate) == (2, 0.5)
    assert recipe.needs_text
    assert Recipe.from_dict(asdict(recipe)) == recipe
    with pytest.raises(ConfigError, match="end_to_end"):
        recipe_with("rtn", ["end_to_end.scale_rate=0.5"])


def test_settings_are_read_by_their_earlier_names():
    assert recipe_with("fast", ["transform=False"]) == recipe_with("fast", ["fits_transform=False"])
    assert not Recipe.from_dict({"transform": False}).fits_transform
