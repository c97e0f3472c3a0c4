"""Where weights live in a model: one view of a weight as [N, C], whatever module holds it.

A site knows the module that holds a weight, how to read and replace it, and what runs its quantized form. Kinds are
rows of `KINDS`: a new way to hold a weight is a class and a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..layers.linear import RotatedLinear
from ..spec.fields import Size
from ..spec.linear import LinearLayout


@dataclass(frozen=True)
class Site(ABC):
    """A weight in a model. path: of the module that holds it."""

    path: str
    module: nn.Module

    @staticmethod
    @abstractmethod
    def holds(module: nn.Module) -> bool:
        """Return whether a module is of this kind."""

    @cached_property
    @abstractmethod
    def size(self) -> Size:
        """N and C, and whether there is a bias."""

    @abstractmethod
    def as_held(self, weight: Tensor) -> Tensor:
        """Return a weight [N, C] in the orientation of the module's parameter; its own inverse."""

    @property
    def weight(self) -> Tensor:
        """[N, C], a view of the module's parameter."""
        return self.as_held(self.module.get_parameter("weight").detach())

    @property
    def bias(self) -> Tensor | None:
        """[N], or None."""
        return self.module.get_parameter("bias").detach() if self.size.bias else None

    @property
    def dtype(self) -> torch.dtype:
        """That of the parameter."""
        return self.module.get_parameter("weight").dtype

    def put(self, weight: Tensor) -> None:
        """Give the module another weight [N, C], in its dtype."""
        parameter = self.module.get_parameter("weight")
        parameter.data = self.as_held(weight).to(parameter.dtype)

    def packed_module(self, layout: LinearLayout) -> RotatedLinear:
        """Return what runs the quantized weight in the module's place, on its device, empty."""
        parameter = self.module.get_parameter("weight")
        return RotatedLinear(layout, parameter.device, parameter.dtype)


class LinearSite(Site):
    """`nn.Linear`. Subclasses that compute something else of their own, such as routers, are none."""

    @staticmethod
    def holds(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward

    @cached_property
    def size(self) -> Size:
        return Size(self.module.in_features, self.module.out_features, self.module.bias is not None)  # type: ignore[arg-type]

    def as_held(self, weight: Tensor) -> Tensor:
        return weight


class Conv1DSite(Site):
    """Transformers' `Conv1D`, of GPT-2 and its like: a linear whose parameter is [C, N]."""

    @staticmethod
    def holds(module: nn.Module) -> bool:
        return isinstance(module, Conv1D)

    @cached_property
    def size(self) -> Size:
        in_features, out_features = self.module.get_parameter("weight").shape
        return Size(in_features, out_features, True)

    def as_held(self, weight: Tensor) -> Tensor:
        return weight.T

    def packed_module(self, layout: LinearLayout) -> RotatedLinear:
        module = super().packed_module(layout)
        module.stands_for_linear = False
        return module


KINDS: tuple[type[Site], ...] = (LinearSite, Conv1DSite)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is some kind of linear layer, even one that no site covers."""
    return isinstance(module, (nn.Linear, Conv1D))


def site_of(path: str, module: nn.Module) -> Site | None:
    """Return the site of a module that holds one weight; None for every other."""
    kind = next((kind for kind in KINDS if kind.holds(module)), None)
    return None if kind is None else kind(path, module)


def sites_in(module: nn.Module, prefix: str = "") -> Iterator[Site]:
    """Yield every site below a module, in the module's order; prefix: the path of the module itself."""
    for name, child in module.named_modules():
        if site := site_of(".".join(part for part in (prefix, name) if part), child):
            yield site
