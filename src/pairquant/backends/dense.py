"""The backend that accepts every layer: it decodes the weight once and multiplies by it. The weight then has its full size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.linear import decode
from ..spec.linear import LinearLayout, PackedLinear
from .base import Backend


class Dense(Backend):
    """Multiplication by the decoded weight, whose rotation is undone, in the dtype of the activations."""

    name = "decoded"
    most = 1_000
    opaque = False

    def refusal(self, layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def prepare(self, linears: Sequence[PackedLinear], dtype: torch.dtype) -> list[Tensor]:
        weights = [decoded(linear) for linear in linears]
        return [(weights[0] if len(weights) == 1 else torch.cat(weights)).to(dtype)]

    def channels(self, tensors: Sequence[Tensor], group_size: int) -> int:
        return tensors[0].shape[1]

    def compute(
        self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, sizes: Sequence[int], group_size: int
    ) -> Tensor:
        return F.linear(x, tensors[0], bias)

    def input_gradient(self, grad: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int], group_size: int) -> Tensor:
        return grad @ tensors[0]


def decoded(linear: PackedLinear) -> Tensor:
    """Decode the weight, float32 [N, C], by an operator, so that torch.compile does not have to trace the decoding."""
    layout = linear.layout.without_bias()
    return torch.ops.pairquant.decode([linear[name] for name in layout.fields()], layout.numbers())


@torch.library.custom_op("pairquant::decode", mutates_args=())
def decode_op(stored: list[Tensor], layout: list[int]) -> Tensor:
    """Decode the weight, float32 [N, C].

    stored: all tensors of its `layout.fields()`, without bias; layout: the layout's `numbers()`.
    """
    known = LinearLayout.of_numbers(layout)
    return decode(PackedLinear(known, dict(zip(known.fields(), stored, strict=True))))


@decode_op.register_fake
def _(stored, layout):
    known = LinearLayout.of_numbers(layout)
    return stored[0].new_empty(known.out_features, known.in_features, dtype=torch.float32)
