"""Register with Transformers when, and only when, Transformers is used.

Importing `transformers.quantizers` takes seconds; `import pairquant` must not. If it is loaded already we register at
once, otherwise an import hook, Python's own mechanism, registers right after it loads.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder

TARGET = "transformers.quantizers.auto"
REGISTRATION = "pairquant.integrations.transformers"


def register_with_transformers() -> None:
    """Idempotent."""
    if TARGET in sys.modules:
        importlib.import_module(REGISTRATION)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Finds `TARGET` like anybody else, and gives it a loader that imports `REGISTRATION` afterwards."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        self.loader.exec_module(module)
        module.__spec__.loader = module.__loader__ = self.loader
        importlib.import_module(REGISTRATION)
