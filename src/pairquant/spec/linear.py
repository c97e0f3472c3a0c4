"""The one statement of how a quantized linear layer is stored: names, shapes, dtypes, bit order.

Symbols, used everywhere: N output features, C input features, g group size, G = C / g groups, K rotations, b bits.

Codes are packed along the output dimension. `b` words of 32 bits hold 32 columns (or, where 32 / b is whole, each
word holds 32 / b columns), least significant bits first. At 4 bits the eight columns of a word are stored in AWQ's
order: nibble i holds column `AWQ_ORDER[i]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .fields import Field, damaged, finite, short

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


SUPPORTED_BITS = (2, 3, 4, 8)


SUPPORTED_GROUP_SIZES = (32, 64, 128)


MAX_ROTATIONS = 16


def columns_per_block(bits: int) -> int:
    """Output columns that fill a whole number of 32-bit words: 8 at 4 bits, 32 at 3 bits."""
    return 32 // math.gcd(32, bits)


@dataclass(frozen=True)
class LinearLayout:
    """What is needed to know every stored tensor's shape."""

    in_features: int
    out_features: int
    bits: int
    group_size: int
    rotations: int
    bias: bool = False

    @property
    def num_groups(self) -> int:
        return self.in_features // self.group_size

    def misfits(self) -> list[str]:
        """Why a linear of this size cannot be stored in this layout, in words; empty when it can."""
        block = columns_per_block(self.bits)
        faults = []
        if self.in_features % self.group_size:
            faults.append(f"in_features {self.in_features} is not a multiple of group size {self.group_size}")
        if self.out_features % block:
            faults.append(
                f"out_features {self.out_features} is not a multiple of {block} (packing at {self.bits} bits)"
            )
        return faults

    def fields(self) -> dict[str, Field]:
        """Name → dtype and shape of each stored tensor, in the order they are written."""
        words = self.out_features * self.bits // 32
        fields = {
            "qweight": Field(torch.int32, (self.in_features, words)),
            "qzeros": Field(torch.int32, (self.num_groups, words)),
            "scales": Field(torch.float16, (self.num_groups, self.out_features)),
            "theta": Field(torch.float16, (self.rotations, self.in_features // 2)),
            "pairs": Field(torch.int16, (self.rotations, self.in_features)),
            "channel_scales": Field(torch.float16, (1, self.in_features)),
        }
        if self.bias:
            fields["bias"] = Field(torch.float16, (self.out_features,))
        return fields

    def stored_bits(self) -> int:
        """Size of all stored tensors but the bias, in bits."""
        return sum(
            math.prod(field.shape) * field.dtype.itemsize * 8 for name, field in self.fields().items() if name != "bias"
        )


def bits_per_weight(layouts: Iterable[LinearLayout]) -> float:
    """Stored bits of these linears, transforms and scales included, over the number of their weights."""
    layouts = list(layouts)
    return sum(s.stored_bits() for s in layouts) / sum(s.in_features * s.out_features for s in layouts)


#: Names of the stored tensors, bias last and optional.
TENSOR_NAMES = ("qweight", "qzeros", "scales", "theta", "pairs", "channel_scales", "bias")


#: Those of them that make up the transform; the others' last dimension counts output features.
TRANSFORM = ("theta", "pairs", "channel_scales")


@dataclass(frozen=True)
class PackedLinear:
    """One quantized linear layer as it is stored (see `LinearLayout.fields` for shapes and dtypes)."""

    layout: LinearLayout
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    theta: Tensor
    pairs: Tensor
    channel_scales: Tensor
    bias: Tensor | None = None

    @classmethod
    def from_tensors(cls, path: str, layout: LinearLayout, tensors: Mapping[str, Tensor]) -> PackedLinear:
        """Build and check; raises `CheckpointError` naming the faulty tensor as `<path>.<tensor>`."""
        check_fields(path, layout, {name: Field(t.dtype, tuple(t.shape)) for name, t in tensors.items()})
        packed = cls(layout, **{name: tensors[name] for name in layout.fields()})
        packed.check_values(path)
        return packed

    @classmethod
    def joined(cls, parts: Sequence[PackedLinear]) -> PackedLinear:
        """One linear with the output features of all, which must have the first one's transform."""
        tensors = [part.tensors() for part in parts]
        rows = {name: torch.cat([t[name] for t in tensors], -1) for name in tensors[0] if name not in TRANSFORM}
        layout = replace(parts[0].layout, out_features=sum(part.layout.out_features for part in parts))
        return cls(layout, **{**tensors[0], **rows})

    def thinned(self, step: int) -> PackedLinear:
        """The linear with every `step`-th block of `columns_per_block` output features alone, without its bias."""
        blocks = self.layout.out_features // columns_per_block(self.layout.bits)

        def thin(tensor: Tensor) -> Tensor:
            return tensor.unflatten(-1, (blocks, -1))[:, ::step].flatten(1)

        rows = {name: thin(getattr(self, name)) for name in ("qweight", "qzeros", "scales")}
        layout = replace(self.layout, out_features=rows["scales"].shape[1], bias=False)
        return replace(self, layout=layout, bias=None, **rows)

    def shares_transform_with(self, other: PackedLinear) -> bool:
        """Whether both turn their input in the same way."""
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in TRANSFORM)

    def tensors(self) -> dict[str, Tensor]:
        """Stored name → tensor."""
        return {name: getattr(self, name) for name in self.layout.fields()}

    def check_values(self, path: str) -> None:
        """Values that a shape cannot vouch for: finite floats, usable scales, disjoint pairs in range."""
        for name in ("scales", "theta", "channel_scales", "bias"):
            tensor = getattr(self, name)
            if tensor is not None and not finite(tensor):
                raise damaged(f"{path}.{name}", "has values that are not finite")
        if not (self.channel_scales != 0).all():
            raise damaged(f"{path}.channel_scales", "has zeros, which no weight can be divided by")
        g = self.layout.group_size
        local = self.pairs.reshape(-1, g)
        if local.numel() == 0:
            return
        low, high = torch.aminmax(local)
        if low < 0 or high >= g:
            raise damaged(
                f"{path}.pairs", f"has channel {_first_outside(local, g)}, outside 0 to {g - 1} (group size {g})"
            )
        used = torch.zeros(local.shape, dtype=torch.bool, device=local.device)
        if not used.scatter_(-1, local.long(), True).all():
            raise damaged(f"{path}.pairs", "uses a channel twice in one rotation; pairs must be disjoint")


def check_fields(path: str, layout: LinearLayout, found: Mapping[str, Field]) -> None:
    """Compare names, dtypes and shapes with the layout; raises `CheckpointError` naming the first fault."""
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
            raise damaged(f"{path}.{name}", "is one too many: the layer has none")


def _first_outside(local: Tensor, g: int) -> int:
    return int(local[(local < 0) | (local >= g)][0])
