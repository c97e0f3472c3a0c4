"""PairQuant: 4-bit language models by scaled pairwise rotation (ParoQuant, arXiv 2511.10645).

Importing this package is quick, and makes `AutoModelForCausalLM.from_pretrained` understand our checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .integrations.discovery import register

if TYPE_CHECKING:
    from .assessment import evaluate as evaluate
    from .checkpoint.export import export as export
    from .config import PRESETS as PRESETS
    from .config import QuantConfig as QuantConfig
    from .config import Recipe as Recipe
    from .errors import PairQuantError as PairQuantError
    from .hub.upload import push as push
    from .pipeline import quantize as quantize
    from .verbs import inspect as inspect

_HOME = {
    "PRESETS": "config",
    "QuantConfig": "config",
    "Recipe": "config",
    "PairQuantError": "errors",
    "quantize": "pipeline",
    "evaluate": "assessment",
    "inspect": "verbs",
    "export": "checkpoint.export",
    "push": "hub.upload",
}
__all__ = [*_HOME]
__version__ = "0.1.0"

register()


def __getattr__(name: str):
    """Load a public name on first use, so that importing the package does not import PyTorch."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
