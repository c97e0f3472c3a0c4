"""Register with Transformers and PEFT when, and only when, they are used.

Importing them takes seconds; `import pairquant` must not. If one is loaded already we register at once, otherwise an
import hook, Python's own mechanism, registers right after it loads.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder

#: Their module → ours, which registers when it is imported.
REGISTRATIONS = {
    "transformers.quantizers.auto": "pairquant.integrations.transformers",
    "peft": "pairquant.integrations.peft",
}


def register() -> None:
    """Idempotent."""
    for target in REGISTRATIONS:
        if target in sys.modules:
            _register_with(target)
        elif not any(isinstance(finder, _AfterImport) and finder.target == target for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport(target))


class _AfterImport(MetaPathFinder):
    """Lets the other finders find `target`, and wraps its loader so that our registration is imported right after it.

    It is removed only once `target` has been loaded, since libraries look for PEFT's spec without importing it.
    """

    def __init__(self, target: str):
        self.target = target

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.target:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader, finder: _AfterImport):
        self.loader, self.finder = loader, finder

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        self.loader.exec_module(module)
        module.__spec__.loader = module.__loader__ = self.loader
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _register_with(self.finder.target)


def _register_with(target: str) -> None:
    """Register with a library; if its version is unknown to us, it goes on working for everything but our models."""
    try:
        importlib.import_module(REGISTRATIONS[target])
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"PairQuant cannot register with this version of {target.partition('.')[0]} ({error}); its models will not "
            "work there. Needed: transformers >= 5.17, peft >= 0.20.",
            stacklevel=2,
        )
