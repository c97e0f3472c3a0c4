"""Name modules of a model by patterns: a path, parts of one that follow each other, or `re:` and a regular expression."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..support.errors import ConfigError


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Tell whether one of the patterns names a module's path.

    "down_proj" names every path that has this part, "experts" all that lies in modules of this name, "model.layers.3" that path and all
    paths below it, and "re:.*gate$" every path that the regular expression matches from the start of the path.
    """
    return any(_matches_one(path, pattern) for pattern in patterns)


def _matches_one(path: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], path) is not None
    return f".{pattern}." in f".{path}."


def require_regular_expression(option: str, pattern: str) -> None:
    """Check that the regular expression after `re:` can be compiled; raises `ConfigError`, which names the option."""
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ConfigError(f"{option} pattern {pattern!r} is not a regular expression: {error}") from error
