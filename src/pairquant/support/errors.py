"""Every error that PairQuant raises on purpose.

Each message names the wrong value, what is allowed, and what to do next. The command line prints these errors without a
traceback. Any other exception is a bug, and the command line shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PairQuantError(Exception):
    """Base class of all errors that the caller can correct."""


class ConfigError(PairQuantError, ValueError):
    """An option has a value that is not allowed, or does not fit this model."""


class SourceError(PairQuantError, ValueError):
    """A source model, tokenizer or file is missing, unreadable, or already quantized."""


class TextError(PairQuantError, ValueError):
    """Text for calibration or evaluation is missing, unreadable, or too short."""


class CalibrationError(PairQuantError, ValueError):
    """Calibration text makes the model compute values that are not finite, or a Hessian that cannot be factored."""


class CheckpointError(PairQuantError, ValueError):
    """A checkpoint is damaged, incomplete, or cannot be written."""


class KernelError(PairQuantError, ValueError):
    """A tensor given to a kernel has a shape, dtype or device that the kernel does not accept."""


class HubError(PairQuantError, RuntimeError):
    """The hub cannot be reached, or refuses: there is no token, the token may only read, or the owner does not exist."""


class ResourceError(PairQuantError, RuntimeError):
    """The machine ran out of memory or disk."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'fast'?"` with the name in `known` that is most similar; "" if none is similar."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
