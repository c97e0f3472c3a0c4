"""Every error that PairQuant raises on purpose.

Each message names the value at fault, what is allowed, and what to do next. The command line prints these without
a traceback; anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PairQuantError(Exception):
    """Base class: something that the caller can mend."""


class ConfigError(PairQuantError, ValueError):
    """An option has a value that is not allowed, or does not fit this model."""


class SourceError(PairQuantError, ValueError):
    """A source model, tokenizer or file is missing, unreadable, or already quantized."""


class TextError(PairQuantError, ValueError):
    """Text for calibration or evaluation is missing, unreadable, or too short."""


class CalibrationError(PairQuantError, ValueError):
    """Calibration text drives the model to values that are not finite, or Hessians that no damping mends."""


class CheckpointError(PairQuantError, ValueError):
    """A checkpoint is damaged, incomplete, or cannot be written."""


class KernelError(PairQuantError, ValueError):
    """Tensors that a kernel cannot take: wrong shape, dtype or device."""


class HubError(PairQuantError, RuntimeError):
    """The hub cannot be reached, or refuses: no token, one that may only read, no such owner."""


class ResourceError(PairQuantError, RuntimeError):
    """The machine ran out of memory or disk."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'fast'?"` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
