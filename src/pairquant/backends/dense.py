"""The backend that accepts every layer: it decodes the weight once and multiplies by it. The weight then has its full size.

A layer whose activations are rounded keeps its weight in the rotated basis, where they are: the input is rotated, rounded to
the values of the format, and multiplied in its own dtype. That shows what the format costs; it is not faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.activations import rounded
from ..core.linear import decode, rotated_weight, transform_of
from ..core.rotation import rotate_dense
from ..spec.linear import LinearLayout, PackedLinear
from .base import Backend
from .operators import fake, operator


class Dense(Backend):
    """Multiplication by the decoded weight, whose rotation is undone, in the dtype of the activations."""

    name = "decoded"
    most = 1_000
    opaque = False

    def refusal(self, layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def prepare(self, linears: Sequence[PackedLinear], dtype: torch.dtype) -> list[Tensor]:
        if linears[0].layout.activations is not None:
            return [tensor for linear in linears for tensor in _turned(linear, dtype)]
        weights = [decoded(linear) for linear in linears]
        return [(weights[0] if len(weights) == 1 else torch.cat(weights)).to(dtype)]

    def channels(self, tensors: Sequence[Tensor], group_size: int) -> int:
        return tensors[0].shape[1]

    def compute(
        self,
        x: Tensor,
        tensors: Sequence[Tensor],
        bias: Tensor | None,
        sizes: Sequence[int],
        group_size: int,
        activations: str | None = None,
    ) -> Tensor:
        if activations is None:
            return F.linear(x, tensors[0], bias)
        parts = [
            F.linear(rounded(turned(x, matrix), activations, group_size).to(x.dtype), weight)
            for weight, matrix in zip(tensors[::2], tensors[1::2], strict=True)
        ]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y if bias is None else y + bias

    def input_gradient(self, grad: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int], group_size: int) -> Tensor:
        """See `Backend`. This backend is not opaque, so autograd follows `compute` instead of calling this."""
        return grad @ tensors[0]


def turned(x: Tensor, matrix: Tensor) -> Tensor:
    """Compute (x · diag(1/a)) R in float32 for x [..., C]; matrix: diag(1/a) R [G, g, g], or without rotations 1/a [G, g, 1]."""
    return rotate_dense(x.float(), matrix) if matrix.shape[-1] > 1 else x.float() * matrix.flatten()


def _turned(linear: PackedLinear, dtype: torch.dtype) -> list[Tensor]:
    """Return the weight in the rotated basis, [N, C] in this dtype, and the matrix of `turned`."""
    layout = linear.layout.without_bias()
    weight, matrix = torch.ops.pairquant.decode_rotated([linear[name] for name in layout.fields()], layout.numbers())
    return [weight.to(dtype), matrix]


def decoded(linear: PackedLinear) -> Tensor:
    """Decode the weight, float32 [N, C], by an operator, so that torch.compile does not have to trace the decoding."""
    layout = linear.layout.without_bias()
    return torch.ops.pairquant.decode([linear[name] for name in layout.fields()], layout.numbers())


@operator("decode")
def decode_op(stored: list[Tensor], layout: list[int]) -> Tensor:
    """Decode the weight, float32 [N, C].

    stored: all tensors of its `layout.fields()`, without bias; layout: the layout's `numbers()`.
    """
    known = LinearLayout.of_numbers(layout)
    return decode(PackedLinear(known, dict(zip(known.fields(), stored, strict=True))))


@fake("decode")
def _(stored, layout):
    known = LinearLayout.of_numbers(layout)
    return stored[0].new_empty(known.out_features, known.in_features, dtype=torch.float32)


@operator("decode_rotated")
def decode_rotated_op(stored: list[Tensor], layout: list[int]) -> list[Tensor]:
    """Decode the weight but leave it in the rotated basis, float32 [N, C]; also return the matrix of `turned`, float32.

    stored: all tensors of its `layout.fields()`, without bias; layout: the layout's `numbers()`.
    """
    known = LinearLayout.of_numbers(layout)
    packed = PackedLinear(known, dict(zip(known.fields(), stored, strict=True)))
    transform = transform_of(packed)
    factors = transform.inverse_scales.view(known.num_groups, known.group_size, 1)
    return [rotated_weight(packed), factors * transform.matrix if known.rotations else factors]


@fake("decode_rotated")
def _(stored, layout):
    known = LinearLayout.of_numbers(layout)
    g = known.group_size
    return [
        stored[0].new_empty(known.out_features, known.in_features, dtype=torch.float32),
        stored[0].new_empty(known.num_groups, g, g if known.rotations else 1, dtype=torch.float32),
    ]
