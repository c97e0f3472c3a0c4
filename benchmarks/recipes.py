"""Recipes on a benchmark's command line: `fast`, `rtn:bits=3`, `paper:training.epochs=2,share_rotations=True`,
`best:end_to_end=2,end_to_end.fresh=7` with a training of the whole model at the end, of two epochs."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from typing import Any

from pairquant.spec.options import QuantConfig
from pairquant.spec.recipe import recipe_with


def config_from(text: str, **setting: Any) -> QuantConfig:
    """A preset with options of `QuantConfig`, or settings of its recipe, after a colon; `setting`: other defaults."""
    preset, _, options = text.partition(":")
    changes = [option for option in re.split(r",(?![^(]*\))", options) if option]
    own = {change: change.partition("=")[::2] for change in changes if _is_option(change)}
    epochs = next((int(change.partition("=")[2]) for change in changes if change.startswith("end_to_end=")), 0)
    settings = [change for change in changes if change not in own and not change.startswith("end_to_end=")]
    recipe = recipe_with(preset, settings, epochs)
    return QuantConfig(**{**setting, "preset": preset, "recipe": recipe, **{n: _value(v) for n, v in own.values()}})


def _is_option(change: str) -> bool:
    """Whether a change is of `QuantConfig`. Stored results call a recipe's `fits_transform`, True or False, `transform`."""
    name, _, value = change.partition("=")
    return name in {f.name for f in fields(QuantConfig)} and not (name == "transform" and value in ("True", "False"))


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
