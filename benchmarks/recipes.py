"""Recipes on a benchmark's command line: `fast`, `rtn:bits=3`, `paper:training.epochs=2,share_rotations=True`."""

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
    own = {f.name for f in fields(QuantConfig)}
    values = {name: value for name, _, value in (c.partition("=") for c in changes) if name in own}
    recipe = recipe_with(preset, [c for c in changes if c.partition("=")[0] not in own])
    return QuantConfig(**{**setting, "preset": preset, "recipe": recipe, **{n: _value(v) for n, v in values.items()}})


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
