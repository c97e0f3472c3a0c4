"""How a quantized linear layer is stored: `Spec` says in which form, and `PackedLinear` holds the tensors.

Symbols, used everywhere: N output features, C input features, g group size, G = C / g groups, K rotations, b bits.

What is stored consists of parts: the codes, the rotation and the bias. Each part states its tensors, which sizes it cannot
store, and which values are faulty. The code for sizes, checks, merging and cutting uses only these statements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from ..support.errors import ConfigError
from .activations import FORMATS, NAMES
from .checks import require_choice, require_whole
from .codes import SUPPORTED_BITS, SUPPORTED_GROUP_SIZES, Codes, columns_per_block
from .fields import CHANNELS, ROWS, Field, Size, damaged, finite, short
from .mx import WEIGHT_FORMATS, MxCodes
from .rotation import MAX_ROTATIONS, Rotation


class Part(Protocol):
    """A part of what is stored for one weight."""

    def fields(self, size: Size) -> dict[str, Field]:
        """Return the dtype and shape of each tensor by its name, in the order in which they are written."""

    def misfits(self, size: Size) -> Iterator[str]:
        """Yield the reasons, in words, why this part cannot be stored for a linear of this size."""

    def faults(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        """Yield the name of each tensor with faulty values, and what is wrong with it."""


@dataclass(frozen=True)
class Bias:
    """The bias of a linear that has one."""

    def fields(self, size: Size) -> dict[str, Field]:
        return {"bias": Field(torch.float16, (size.out_features,), (ROWS,))}

    def misfits(self, size: Size) -> Iterator[str]:
        yield from ()

    def faults(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        if not finite(tensors["bias"]):
            yield "bias", "has values that are not finite"


@dataclass(frozen=True)
class Spec:
    """The form in which a weight is stored, independent of its size.

    bits: size of a code, 2, 3, 4, 5, 6 or 8; group_size: 32, 64 or 128, the number of channels that share a scale and
    that are rotated with one another; rotations: K, 0 to 16; symmetric: all zero points are in the middle of the codes, at
    2^(b-1); activations: the format of `spec.activations` that the layer's input is rounded to in the rotated basis when the
    layer runs, None for none; weights: "mxfp4" for codes that are 4-bit floats, of which 32 channels share a scale whatever
    the group size is, None for whole numbers. Raises `ConfigError` for other values, and for values that exclude each other.
    """

    bits: int = 4
    group_size: int = 128
    rotations: int = 8
    symmetric: bool = False
    activations: str | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        require_choice("bits", self.bits, SUPPORTED_BITS)
        require_choice("group_size", self.group_size, SUPPORTED_GROUP_SIZES)
        require_whole("rotations", self.rotations, 0, MAX_ROTATIONS)
        if not isinstance(self.symmetric, bool):
            raise ConfigError(f"symmetric is {self.symmetric!r}, allowed: True, False")
        if self.activations is not None:
            require_choice("activations", self.activations, FORMATS)
        if self.weights is not None:
            require_choice("weights", self.weights, WEIGHT_FORMATS)
            require_choice(f"bits of {self.weights} weights", self.bits, (4,))
            if self.symmetric:
                raise ConfigError(
                    f"symmetric is True, allowed with {self.weights} weights: False; they have no zero points"
                )

    @property
    def parts(self) -> tuple[Part, ...]:
        codes = Codes(self.bits, self.group_size) if self.weights is None else MxCodes(self.group_size)
        return codes, Rotation(self.rotations, self.group_size)

    def layout(self, in_features: int, out_features: int, bias: bool = False) -> LinearLayout:
        """Return the layout of a linear of this size."""
        return LinearLayout(self, in_features, out_features, bias)

    def layout_around(self, qweight: Tensor) -> LinearLayout:
        """Return the layout, without bias, of the linear that has these codes: int32 [channels, words]."""
        channels, words = qweight.shape
        return self.layout(channels, words * 32 // self.bits)

    def __str__(self) -> str:
        kind = ", symmetric" if self.symmetric else ""
        inputs = f", {self.activations} activations" if self.activations else ""
        width = f"{self.bits} bits" if self.weights is None else f"{self.weights} weights"
        return f"{width}, groups of {self.group_size}, {self.rotations} rotations{kind}{inputs}"


@dataclass(frozen=True)
class LinearLayout:
    """A `Spec` at the size of one linear, with or without a bias."""

    spec: Spec
    in_features: int
    out_features: int
    bias: bool = False

    @property
    def bits(self) -> int:
        return self.spec.bits

    @property
    def group_size(self) -> int:
        return self.spec.group_size

    @property
    def rotations(self) -> int:
        return self.spec.rotations

    @property
    def activations(self) -> str | None:
        return self.spec.activations

    @property
    def weights(self) -> str | None:
        return self.spec.weights

    @property
    def num_groups(self) -> int:
        return self.in_features // self.group_size

    @property
    def size(self) -> Size:
        return Size(self.in_features, self.out_features, self.bias)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.spec.parts, Bias()) if self.bias else self.spec.parts

    def misfits(self) -> list[str]:
        """Return the reasons, in words, why a linear of this size cannot be stored in this layout; empty if it can."""
        return [fault for part in self.parts for fault in part.misfits(self.size)]

    def fields(self) -> dict[str, Field]:
        """Return the dtype and shape of each stored tensor by its name, in the order in which they are written."""
        return dict(_fields(self))

    def without_bias(self) -> LinearLayout:
        """Return the same layout for a linear that has no bias."""
        return replace(self, bias=False)

    def stored_bits(self) -> int:
        """Return the size in bits of all stored tensors except the bias."""
        return sum(field.nbytes * 8 for part in self.spec.parts for field in part.fields(self.size).values())

    def transform_bits(self) -> int:
        """Return the size of the stored transform, in bits."""
        return sum(self.fields()[name].nbytes * 8 for name in transform_names(self))

    def numbers(self) -> list[int]:
        """Return the layout without its bias as whole numbers, which PyTorch operators can take; `of_numbers` reads them.

        Whether the codes are symmetric is left out: it makes no difference to reading them.
        """
        spec = self.spec
        activations = 0 if spec.activations is None else NAMES.index(spec.activations) + 1
        weights = 0 if spec.weights is None else WEIGHT_FORMATS.index(spec.weights) + 1
        return [self.in_features, self.out_features, spec.bits, spec.group_size, spec.rotations, activations, weights]

    @classmethod
    def of_numbers(cls, numbers: Sequence[int]) -> LinearLayout:
        """Return the layout, without bias, from the numbers that `numbers` returned."""
        in_features, out_features, bits, group_size, rotations, activations, weights = numbers
        rounded = NAMES[activations - 1] if activations else None
        spec = Spec(bits, group_size, rotations, False, rounded, WEIGHT_FORMATS[weights - 1] if weights else None)
        return cls(spec, in_features, out_features)


@lru_cache(maxsize=1024)
def _fields(layout: LinearLayout) -> dict[str, Field]:
    return {name: field for part in layout.parts for name, field in part.fields(layout.size).items()}


def bits_per_weight(layouts: Iterable[LinearLayout]) -> float:
    """Return the stored bits of these linears, including transforms and scales, divided by the number of their weights."""
    layouts = list(layouts)
    return sum(s.stored_bits() for s in layouts) / sum(s.in_features * s.out_features for s in layouts)


#: Names of all tensors that a quantized linear may store, in the order in which they are written.
TENSOR_NAMES = tuple(Spec().layout(128, 32, bias=True).fields())


@dataclass(frozen=True)
class PackedLinear:
    """One quantized linear layer as it is stored: `packed["scales"]` is one of its tensors (see `LinearLayout.fields`)."""

    layout: LinearLayout
    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def bias(self) -> Tensor | None:
        """float16 [N], or None."""
        return self.tensors.get("bias")

    @classmethod
    def from_tensors(cls, path: str, layout: LinearLayout, tensors: Mapping[str, Tensor]) -> PackedLinear:
        """Make a packed linear of these tensors, after checking their names, dtypes, shapes and values.

        path: the linear's path in its model. Raises `CheckpointError`, which names the faulty tensor `<path>.<tensor>`.
        """
        check_fields(path, layout, {name: Field(t.dtype, tuple(t.shape)) for name, t in tensors.items()})
        packed = cls(layout, {name: tensors[name] for name in layout.fields()})
        packed.check_values(path)
        return packed

    @classmethod
    def joined(cls, parts: Sequence[PackedLinear]) -> PackedLinear:
        """Return one linear with the output features of all parts, without checking that their transforms are equal.

        The result has the transform and the spec of the first part.
        """
        layout = replace(parts[0].layout, out_features=sum(part.layout.out_features for part in parts))
        tensors = {}
        for name, field in layout.fields().items():
            rows = field.axis(ROWS)
            tensors[name] = parts[0][name] if rows is None else torch.cat([part[name] for part in parts], rows)
        return cls(layout, tensors)

    def thinned(self, step: int) -> PackedLinear:
        """Return a linear with only every `step`-th block of `columns_per_block` output features, and without bias."""
        blocks = self.layout.out_features // columns_per_block(self.layout.bits)
        layout = replace(self.layout, out_features=len(range(0, blocks, step)) * (self.layout.out_features // blocks))
        layout = replace(layout, bias=False)
        tensors = {}
        for name, field in layout.fields().items():
            tensor = self[name]
            if field.axis(ROWS) is not None:
                tensor = tensor.unflatten(-1, (blocks, -1))[:, ::step].flatten(1)
            tensors[name] = tensor
        return PackedLinear(layout, tensors)

    def shares_transform_with(self, other: PackedLinear) -> bool:
        """Tell whether both have the same transform, so that they can share the transformed input."""
        return all(torch.equal(self[name], other[name]) for name in transform_names(self.layout))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedLinear:
        """Return a packed linear with the same tensors on a device."""
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors.items()}
        return PackedLinear(self.layout, moved)

    def with_tensors(self, **changed: Tensor) -> PackedLinear:
        """Return a packed linear with some tensors replaced; it shares the others."""
        return PackedLinear(self.layout, {**self.tensors, **changed})

    def check_values(self, path: str, transform: bool = True) -> None:
        """Check the values of all tensors (see each part's `faults`); raises `CheckpointError` for the first fault.

        transform: False leaves out the transform, which experts share, so that one check is enough for all of them.
        """
        for part in self.layout.parts:
            if transform or not isinstance(part, Rotation):
                for name, fault in part.faults(self.tensors):
                    raise damaged(f"{path}.{name}", fault)


def transform_names(layout: LinearLayout) -> tuple[str, ...]:
    """Return the names of the stored tensors of the transform: those that have channels but no rows."""
    return tuple(name for name, field in layout.fields().items() if field.axis(ROWS) is None and CHANNELS in field.axes)


def check_fields(path: str, layout: LinearLayout, found: Mapping[str, Field]) -> None:
    """Compare names, dtypes and shapes with the layout; raises `CheckpointError`, which names the first fault."""
    for name, want in layout.fields().items():
        if name not in found:
            raise damaged(f"{path}.{name}", "is missing")
        have = found[name]
        if have.dtype != want.dtype:
            raise damaged(f"{path}.{name}", f"is {short(have.dtype)}, must be {short(want.dtype)}")
        if have.shape != want.shape:
            raise damaged(f"{path}.{name}", f"has shape {list(have.shape)}, must be {list(want.shape)}")
    for name in found:
        if name in TENSOR_NAMES and name not in layout.fields():
            raise damaged(f"{path}.{name}", "should not be there: this layer stores no such tensor")
