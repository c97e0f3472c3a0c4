"""What a format of another program is: which codes it holds, as which tensors, and what its readers must be told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.packing import unpack
from ..spec.fields import Field
from ..spec.linear import LinearLayout, PackedLinear, Spec
from ..spec.mixed import ANY_WIDTH
from ..spec.options import QuantConfig
from ..support.errors import ConfigError


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds. layouts: of its quantized weights, by path; plain: paths of linears in 16 bits."""

    layouts: Mapping[str, LinearLayout]
    plain: tuple[str, ...] = ()

    @property
    def common(self) -> LinearLayout:
        """The layout of the first weight: it tells bits, group size and symmetry where a format has only one of each."""
        return next(iter(self.layouts.values()))


class Format(ABC):
    """How another program stores quantized weights. They must have no transform: no rotations, channel scales of 1.

    name: what the user types; readers: the programs that load it, in words; command: one that does, for a path; bits: those
    that it holds with zero points or without; symmetric: what is quantized for it has its zero points in the middle;
    group_size: the largest, larger ones would save nothing; one_form: all weights must have the same bits and group size;
    embeddings: it holds quantized embeddings; stacks: the families whose experts it holds, all of a block in one tensor of
    each part; None: it holds experts one by one, as the sources of most families do.
    """

    name: ClassVar[str]
    readers: ClassVar[str]
    command: ClassVar[str]
    bits: ClassVar[tuple[int, ...]]
    symmetric: ClassVar[bool] = False
    group_size: ClassVar[int] = 128
    one_form: ClassVar[bool] = False
    embeddings: ClassVar[bool] = False
    stacks: ClassVar[tuple[str, ...] | None] = None

    def refusal(self, layout: LinearLayout) -> str | None:
        """Return why a weight of this layout cannot be stored exactly, in words that follow its name; None if it can."""
        if layout.rotations:
            return f"has {layout.rotations} rotations"
        if layout.weights is not None:
            return f"has {layout.weights} weights, {self.name} holds whole numbers"
        if layout.bits not in self.bits:
            return f"has {layout.bits} bits, {self.name} holds {', '.join(map(str, self.bits))}"
        return None

    @abstractmethod
    def tensors(self, packed: PackedLinear) -> dict[str, Tensor]:
        """Return what is stored for a weight, by the last part of its name. The bias is not among them."""

    def stack_name(self, home: str, part: str, stored: str) -> str:
        """Return the name of the weights of one part of all experts of a block, where it holds them in one tensor.

        home: the source's name of the experts' module; part: "gate_proj", "up_proj" or "down_proj"; stored: the source's
        name of the part.
        """
        return f"{home}.{stored}"

    @abstractmethod
    def entries(self, contents: Contents) -> dict[str, Any]:
        """Return the entries of config.json that readers need."""

    def fields(self, layout: LinearLayout) -> dict[str, Field]:
        """Return dtype and shape of what `tensors` returns for a weight of this layout, without any data."""
        empty = {n: torch.empty(f.shape, dtype=f.dtype, device="meta") for n, f in layout.fields().items()}
        return {n: Field(t.dtype, tuple(t.shape)) for n, t in self.tensors(PackedLinear(layout, empty)).items()}

    def bits_per_weight(self, contents: Contents) -> float:
        """Return the bits that the format stores, everything counted but biases, divided by the number of weights."""
        layouts = contents.layouts.values()
        stored = sum(field.nbytes * 8 for layout in layouts for field in self.fields(layout).values())
        return stored / sum(layout.in_features * layout.out_features for layout in layouts)

    def settled(self, config: QuantConfig) -> QuantConfig:
        """Return the options for quantizing a model for this format: transforms are folded into the model, and layers have forms
        that it holds. Presets that fit no transform, and transform "none", fold none.

        Raises `ConfigError` for options that it cannot have.
        """
        target, candidates = config.target, config.candidates
        if config.weights is not None:
            raise ConfigError(
                f"weights is {config.weights!r}, and {self.name} holds whole numbers. Leave --weights out."
            )
        if (
            config.rotations == "auto"
            or (target is not None and target.rotated is not None)
            or any(candidates.rotations)
        ):
            raise ConfigError(f"layers are to have rotations, and {self.name} holds none. Leave --format out.")
        if target is not None and self.one_form:
            raise ConfigError(
                f"a size is wanted, which gives layers bits of their own, and {self.name} has one form for all. Leave "
                "--target-bpw and --target-size out, or choose compressed-tensors, gguf or mlx."
            )
        transform = config.transform
        if transform == "rotated":
            transform = "folded" if config.recipe.fits_transform else "none"
        symmetric, size = config.symmetric or self.symmetric, config.group_size
        if self.group_size < 128:
            size = self.group_size if size == "auto" else min(size, self.group_size)
        held = [bits for bits in self.bits if self.refusal(Spec(bits, 32, 0, symmetric).layout(128, 128)) is None]
        if candidates.bits == ANY_WIDTH.bits:
            candidates = replace(candidates, bits=tuple(held))
        return replace(config, transform=transform, symmetric=symmetric, group_size=size, candidates=candidates)

    def require(self, contents: Contents) -> None:
        """Raise `ConfigError` for the first weight that cannot be stored exactly, naming it and the reason."""
        for path, layout in contents.layouts.items():
            if reason := self.refusal(layout):
                remedy = (
                    REMEDY if layout.rotations or layout.weights else "Choose bits that it holds, or another format."
                )
                raise ConfigError(f"{path} {reason}, so it cannot be stored as {self.name}. {remedy}")
            if self.one_form and layout.spec != contents.common.spec:
                raise ConfigError(
                    f"{path} is stored with {layout.spec}, other layers with {contents.common.spec}: {self.name} has one form for "
                    "all. Choose compressed-tensors, gguf or mlx, which hold a form for each layer."
                )


REMEDY = (
    "Quantize the original model with --format and this name, which chooses what the format holds; or export to bf16, "
    "which the format's own tools can quantize anew."
)


def codes_of(packed: PackedLinear) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 [N, C], zero points uint8 [N, G] and scales float16 [N, G] of a weight, rows first."""
    bits = packed.layout.bits
    codes, zeros = (unpack(packed[name], bits).T.contiguous() for name in ("qweight", "qzeros"))
    return codes, zeros, packed["scales"].T.contiguous()
