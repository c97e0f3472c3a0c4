"""Checks of single values, with messages that name the value and what is allowed."""

from __future__ import annotations

from typing import Any

from ..support.errors import ConfigError, did_you_mean


def require_choice(name: str, value: Any, allowed) -> None:
    if type(value) not in (str, int) or value not in allowed:
        names = [str(item) for item in allowed]
        raise ConfigError(f"{name} is {value!r}, allowed: {', '.join(names)}{did_you_mean(str(value), names)}")


def require_whole(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}, allowed: whole numbers from {low} to {high}")


def require_between(name: str, value: Any, low: float, high: float) -> None:
    if type(value) not in (int, float) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}, allowed: {low} to {high}")


def are_strings(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
