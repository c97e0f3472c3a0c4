"""Check single values. Every `require_…` raises `ConfigError`, which names the value and what is allowed."""

from __future__ import annotations

from typing import Any

from ..support.errors import ConfigError, did_you_mean


def require_choice(name: str, value: Any, allowed) -> None:
    """Check that the value, a string or whole number, is one of `allowed`."""
    if type(value) not in (str, int) or value not in allowed:
        names = [str(item) for item in allowed]
        raise ConfigError(f"{name} is {value!r}, allowed: {', '.join(names)}{did_you_mean(str(value), names)}")


def require_whole(name: str, value: Any, low: int, high: int) -> None:
    """Check that the value is a whole number from `low` to `high`."""
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}, allowed: whole numbers from {low} to {high}")


def require_between(name: str, value: Any, low: float, high: float) -> None:
    """Check that the value is a number from `low` to `high`."""
    if type(value) not in (int, float) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}, allowed: numbers from {low} to {high}")


def are_strings(value: Any) -> bool:
    """Tell whether the value is a list or tuple that holds only strings."""
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
