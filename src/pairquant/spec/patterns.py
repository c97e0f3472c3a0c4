"""Naming modules of a model by patterns: a path, its first or last parts, or `re:` and a regular expression."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..support.errors import ConfigError


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Return whether a module path is named by one of the patterns.

    "down_proj" names every path that ends so, "model.layers.3" everything below it, "re:.*gate$" every path that the
    expression matches from its start.
    """
    return any(_matches_one(path, pattern) for pattern in patterns)


def _matches_one(path: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], path) is not None
    return f".{path}.".endswith(f".{pattern}.") or f"{path}.".startswith(f"{pattern}.")


def require_regular_expression(option: str, pattern: str) -> None:
    """Refuse a pattern whose `re:` expression cannot be compiled; raises `ConfigError` naming the option."""
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ConfigError(f"{option} pattern {pattern!r} is not a regular expression: {error}") from error
