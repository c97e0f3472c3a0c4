"""The grids that a rotated weight is rounded to. A point is ŵ = k · s: k is a step of the grid, s the scale of its row and group.

`WholeGrid` has whole steps from -z to 2^b - 1 - z (see `core.grid`); `MxGrid` has the sixteen steps of E2M1, and powers of two as
scales of blocks of 32 channels. The rounding loops know a grid by `lowest`, `span` and whether its steps are `floating`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ..spec.linear import PackedLinear
from ..spec.mx import E2M1_MAX, E8M0_BIAS
from .grid import MIN_SCALE, affine_parameters, dequantize, quantize
from .mx import e2m1, e2m1_codes, e2m1_values, exp2, exponent, nearest_power
from .packing import pack, unpack


@dataclass(frozen=True)
class Grid(ABC):
    """The grid of every row and group. scale: float32 [N, G], values that can be stored.

    floating: steps are E2M1's instead of whole numbers.
    """

    scale: Tensor
    floating: ClassVar[bool]

    @property
    @abstractmethod
    def lowest(self) -> Tensor:
        """The lowest step of every row and group, [N, G]."""

    @property
    @abstractmethod
    def span(self) -> float:
        """The difference between the highest step and the lowest one."""

    @abstractmethod
    def codes(self, w: Tensor) -> Tensor:
        """Return the codes of the grid points nearest to w [N, C]: uint8 [N, C]."""

    @abstractmethod
    def codes_of(self, steps: Tensor, lowest: Tensor) -> Tensor:
        """Return the codes of steps, uint8 of their shape; lowest: the lowest step of each."""

    @abstractmethod
    def steps(self, codes: Tensor) -> Tensor:
        """Return the steps that codes [N, C] stand for: float32 [N, C]."""

    @abstractmethod
    def storable(self, scale: Tensor) -> Tensor:
        """Return the nearest scales that can be stored, of any shape."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are stored beside the codes."""

    def values(self, codes: Tensor) -> Tensor:
        """Return the weights that codes [N, C] stand for: float32 [N, C]."""
        return (self.steps(codes).view(*self.scale.shape, -1) * self.scale[..., None]).view(codes.shape)


@dataclass(frozen=True)
class WholeGrid(Grid):
    """Whole steps. zero: the zero points, [N, G] in the dtype of the scales, which are rounded to fp16."""

    zero: Tensor
    bits: int
    floating: ClassVar[bool] = False

    @classmethod
    def spanning(cls, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> WholeGrid:
        """Make the grid whose ends are `low` and `high` [N, G]."""
        scale, zero = affine_parameters(low, high, bits, symmetric)
        return cls(stored(scale), zero, bits)

    @property
    def lowest(self) -> Tensor:
        return -self.zero

    @property
    def span(self) -> float:
        return 2**self.bits - 1

    def codes(self, w: Tensor) -> Tensor:
        return quantize(w, self.scale, self.zero, self.bits)

    def codes_of(self, steps: Tensor, lowest: Tensor) -> Tensor:
        return (steps - lowest).to(torch.uint8)

    def steps(self, codes: Tensor) -> Tensor:
        return (codes.view(*self.scale.shape, -1) - self.zero[..., None]).view(codes.shape)

    def values(self, codes: Tensor) -> Tensor:
        return dequantize(codes, self.scale, self.zero)

    def storable(self, scale: Tensor) -> Tensor:
        return stored(scale.clamp(min=MIN_SCALE))

    def tensors(self) -> dict[str, Tensor]:
        return {
            "qzeros": pack(self.zero.T.to(torch.uint8).contiguous(), self.bits),
            "scales": self.scale.T.half().contiguous(),
        }


@dataclass(frozen=True)
class MxGrid(Grid):
    """E2M1 steps, float32, with powers of two as scales."""

    floating: ClassVar[bool] = True

    @property
    def lowest(self) -> Tensor:
        return torch.full_like(self.scale, -E2M1_MAX)

    @property
    def span(self) -> float:
        return 2 * E2M1_MAX

    def codes(self, w: Tensor) -> Tensor:
        return e2m1_codes(e2m1(w.view(*self.scale.shape, -1) / self.scale[..., None])).view(w.shape)

    def codes_of(self, steps: Tensor, lowest: Tensor) -> Tensor:
        return e2m1_codes(steps)

    def steps(self, codes: Tensor) -> Tensor:
        return e2m1_values(codes)

    def storable(self, scale: Tensor) -> Tensor:
        return nearest_power(scale)

    def tensors(self) -> dict[str, Tensor]:
        return {"scales": pack((exponent(self.scale) + E8M0_BIAS).T.to(torch.uint8).contiguous(), 8)}


def stored(x: Tensor) -> Tensor:
    """Round x to the values that fp16 can store; the result has x's dtype."""
    return x.half().to(x.dtype)


def grid_of(packed: PackedLinear) -> Grid:
    """Return the grid that a packed linear stores."""
    if packed.layout.weights is not None:
        return MxGrid(exp2(unpack(packed["scales"], 8).T.int() - E8M0_BIAS))
    bits = packed.layout.bits
    return WholeGrid(packed["scales"].T.float(), unpack(packed["qzeros"], bits).T.float(), bits)


AnyGrid = TypeVar("AnyGrid", bound=Grid)


def better_of(grid: AnyGrid, other: AnyGrid, take: Tensor) -> AnyGrid:
    """Return the grid that has the scales and zero points of the other where `take`, bool [N, G], says so."""
    tensors = {name: value for name, value in vars(grid).items() if isinstance(value, Tensor)}
    return replace(grid, **{name: torch.where(take, vars(other)[name], value) for name, value in tensors.items()})
