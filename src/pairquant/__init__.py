"""PairQuant: 4-bit language models by scaled pairwise rotation (ParoQuant, arXiv 2511.10645).

Importing this package is quick: it does not import PyTorch. It registers PairQuant with Transformers and PEFT, so that
`AutoModelForCausalLM.from_pretrained` can load checkpoints that PairQuant wrote.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .integrations.discovery import register
from .support.version import __version__ as __version__

if TYPE_CHECKING:
    from .checkpoint.export import export as export
    from .hub.upload import push as push
    from .jobs.evaluate import evaluate as evaluate
    from .jobs.fold import fold as fold
    from .jobs.inspect import inspect as inspect
    from .jobs.other_formats import quantize_as as quantize_as
    from .jobs.plan import plan as plan
    from .jobs.quantize import quantize as quantize
    from .spec.options import QuantConfig as QuantConfig
    from .spec.recipe import PRESETS as PRESETS
    from .spec.recipe import Recipe as Recipe
    from .support.errors import PairQuantError as PairQuantError

#: Each public name, and the module that defines it.
_HOME = {
    "PRESETS": "spec.recipe",
    "QuantConfig": "spec.options",
    "Recipe": "spec.recipe",
    "PairQuantError": "support.errors",
    "quantize": "jobs.quantize",
    "fold": "jobs.fold",
    "quantize_as": "jobs.other_formats",
    "plan": "jobs.plan",
    "evaluate": "jobs.evaluate",
    "inspect": "jobs.inspect",
    "export": "checkpoint.export",
    "push": "hub.upload",
}
__all__ = [*_HOME]

register()


def __getattr__(name: str):
    """Import a public name when it is first used, so that importing the package does not import PyTorch."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
