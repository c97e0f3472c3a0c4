r"""Whether an answer is right: GSM8K's numbers, and \boxed{…} answers as MATH-500's and AIME's."""

from __future__ import annotations

import re
import threading
from decimal import Decimal
from importlib.util import find_spec

from ..support.errors import ConfigError

NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+")
#: Seconds for one answer: a power tower takes longer than the universe.
PATIENCE = 5


def same_number(answer: str, expected: str) -> bool:
    r"""Exact match of the last number in \boxed{…}; without a box, after "####"; without that, in the whole answer."""
    box = boxed(answer)
    found, right = _last_number(answer.rpartition("####")[2] if box is None else box), _last_number(expected)
    return found is not None and found == right


def same_boxed(answer: str, expected: str) -> bool:
    r"""Equality of the last \boxed{…} and the expected expression in LaTeX, as Math-Verify sees it; no box, no match."""
    from math_verify import LatexExtractionConfig, parse, verify

    box = boxed(answer)
    if box is None:
        return False
    seconds = PATIENCE if threading.current_thread() is threading.main_thread() else None  # its clock is a signal
    latex = [LatexExtractionConfig()]  # what it takes for plain expressions it hands to Python
    right, found = (parse(f"\\boxed{{{text}}}", latex, parsing_timeout=seconds) for text in (expected, box))  # type: ignore[arg-type]
    return bool(verify(right, found, timeout_seconds=seconds))


def require_math_verify() -> None:
    """Raise `ConfigError`."""
    if find_spec("math_verify") is None:
        raise ConfigError(
            "boxed answers are compared by Math-Verify, which is not installed. Run: pip install 'pairquant[eval]'"
        )


def boxed(text: str) -> str | None:
    r"""Return what the last complete \boxed{…} holds, braces within it included."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\{", text)]):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place]
    return None


def _last_number(text: str) -> Decimal | None:
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None
