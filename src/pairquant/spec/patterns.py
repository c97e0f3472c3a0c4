"""Naming modules of a model by patterns: a path, its last parts, or `re:` and a regular expression."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..support.errors import ConfigError


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a module path is named by one of the `ignore` patterns (see `QuantConfig`)."""
    return any(_matches_one(path, pattern) for pattern in patterns)


def _matches_one(path: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], path) is not None
    return f".{path}.".endswith(f".{pattern}.") or f"{path}.".startswith(f"{pattern}.")


def require_regular_expression(pattern: str) -> None:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ConfigError(f"ignore pattern {pattern!r} is not a regular expression: {error}") from error
