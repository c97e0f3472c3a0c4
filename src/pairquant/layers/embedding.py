"""The module that looks up the rows of a packed input embedding inside a model.

The codes of a token lie side by side in memory, in planes of 8, 4, 2 and 1 bits, so that a lookup reads the bytes of its
tokens and no others. A row is decoded as the weight of a linear is: (q - z) · s, then out of the rotated basis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.linear import transform_of
from ..core.packing import pack, unpack
from ..core.rotation import rotate_dense
from ..spec.linear import LinearLayout, PackedLinear
from ..support.errors import CheckpointError
from .holder import HoldsPacked

#: Bits of a code → the widths of its planes, the lowest bits first.
PLANES = {bits: tuple(width for width in (8, 4, 2, 1) if bits & width) for bits in range(1, 9)}


@dataclass(frozen=True)
class Rows:
    """A packed embedding by rows.

    planes: of each token's codes, uint8 [V, C · width / 8]; scales: float16 [V, G]; zeros: uint8 [V, G]; inverse_scales:
    float32 [C]; matrix: float32 [G, g, g], out of the rotated basis, empty without rotations.
    """

    #: The names of the tensors beside the planes.
    OTHERS: ClassVar = ("scales", "zeros", "inverse_scales", "matrix")

    planes: list[Tensor]
    scales: Tensor
    zeros: Tensor
    inverse_scales: Tensor
    matrix: Tensor

    @classmethod
    def of(cls, packed: PackedLinear) -> Rows:
        """Arrange a packed embedding by rows. Raises `CheckpointError` for codes that are no whole numbers."""
        bits = packed.layout.bits
        if packed.layout.weights is not None:
            raise CheckpointError(
                f"the input embedding's codes are {packed.layout.weights}, must be whole numbers: only these are looked up. "
                "Quantize the model again."
            )
        planes = to_planes(unpack(packed["qweight"], bits).T.contiguous(), bits)
        zeros = unpack(packed["qzeros"], bits).T.contiguous()
        transform = transform_of(packed)
        matrix = transform.matrix.mT.contiguous() if packed.layout.rotations else transform.matrix.new_empty(0)
        return cls(planes, packed["scales"].T.contiguous(), zeros, transform.inverse_scales, matrix)

    def others(self) -> dict[str, Tensor]:
        """Return the tensors beside the planes, by name."""
        return {name: getattr(self, name) for name in self.OTHERS}

    def stored(self, bits: int) -> dict[str, Tensor]:
        """Return the stored tensors that were rearranged, bit for bit."""
        codes = of_planes(self.planes, bits)
        packed = {name: pack(x.T.contiguous(), bits) for name, x in (("qweight", codes), ("qzeros", self.zeros))}
        return {**packed, "scales": self.scales.T.contiguous()}

    def look_up(self, tokens: Tensor, bits: int) -> Tensor:
        """Decode the rows of some tokens, integer [...]: float32 [..., C]."""
        chosen = tokens.reshape(-1)
        codes = of_planes([plane[chosen] for plane in self.planes], bits)
        scales, zeros = self.scales[chosen].float(), self.zeros[chosen].float()
        channels, groups = len(self.inverse_scales), scales.shape[1]
        steps = codes.view(-1, groups, channels // groups).float() - zeros[..., None]
        rows = (steps * scales[..., None]).flatten(1)
        if self.matrix.numel():
            rows = rotate_dense(rows, self.matrix)
        return (rows * self.inverse_scales).view(*tokens.shape, channels)


def to_planes(codes: Tensor, bits: int) -> list[Tensor]:
    """Cut codes, uint8 [V, C], into planes: uint8 [V, C · width / 8] each. C must be a multiple of 8."""
    planes, first = [], 0
    for width in PLANES[bits]:
        part = (codes >> first) & (2**width - 1)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        planes.append((part.view(len(codes), -1, 8 // width) << shifts).sum(-1, dtype=torch.uint8))
        first += width
    return planes


def of_planes(planes: list[Tensor], bits: int) -> Tensor:
    """Put planes together again: uint8 [V, C]."""
    parts, first = [], 0
    for plane, width in zip(planes, PLANES[bits], strict=True):
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)
        parts.append(((plane[..., None] >> shifts) & (2**width - 1)).flatten(1) << first)
        first += width
    codes = parts[0]
    for part in parts[1:]:
        codes = codes | part
    return codes


@dataclass(frozen=True)
class RowScale:
    """What an embedding multiplies its rows by. rounded: whether this number is first rounded to the dtype of the rows."""

    value: float
    rounded: bool

    def in_dtype(self, dtype: torch.dtype) -> float:
        """Return the number to multiply rows of this dtype by."""
        return torch.tensor(self.value, dtype=dtype).item() if self.rounded else self.value


class RotatedEmbedding(HoldsPacked):
    """An input embedding whose buffers are a `PackedLinear`, under the stored names, shapes and dtypes.

    `forward` takes tokens, integer [...], and returns their rows, [..., C] in `dtype`. At the first call the stored codes,
    zero points and scales are rearranged by rows; they are restored bit for bit when the layer is saved or moved.
    """

    def __init__(
        self,
        layout: LinearLayout,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        scale: RowScale | None = None,
    ):
        super().__init__(layout, device, dtype)
        self.scale = scale
        self.num_embeddings, self.embedding_dim = layout.out_features, layout.in_features
        self._rows: Rows | None = None

    @property
    def weight(self) -> Tensor:
        """An empty tensor of the dtype and on the device of the rows, which some models ask for."""
        return torch.empty(0, dtype=self.dtype, device=self.theta.device)

    @property
    def packed(self) -> PackedLinear:
        """The tensors in their stored form."""
        rearranged = {} if self._rows is None else self._rows.stored(self.layout.bits)
        return PackedLinear(self.layout, {n: rearranged.get(n, getattr(self, n)) for n in self.layout.fields()})

    def prepare(self) -> Rows:
        """Let the rearranged tensors replace the stored ones, and return them."""
        if self._rows is None:
            self._rows = Rows.of(self.packed)
            for name in ("qweight", "qzeros", "scales"):
                setattr(self, name, getattr(self, name).new_empty(0))
        return self._rows

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.prepare().look_up(tokens, self.layout.bits).to(self.dtype)
        return rows if self.scale is None else rows * self.scale.in_dtype(self.dtype)

    def to_embedding(self, dtype: torch.dtype) -> nn.Module:
        """Return an `nn.Embedding` with the decoded rows in this dtype. Not for embeddings with a scale."""
        rows = self.prepare().look_up(torch.arange(self.num_embeddings, device=self.theta.device), self.layout.bits)
        return nn.Embedding.from_pretrained(rows.to(dtype))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings} × {self.embedding_dim}, {self.layout.spec}"

    def _restore(self) -> None:
        if self._rows is not None:
            for name, tensor in self._rows.stored(self.layout.bits).items():
                setattr(self, name, tensor)
            self._rows = None

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.packed.tensors.items()})
