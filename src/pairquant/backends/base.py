"""What a backend is: it says which layers it takes, makes their weights ready, and runs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec.linear import LinearLayout, PackedLinear


class Backend(ABC):
    """One way to run quantized linears.

    name: as users and operators know it; replaces: stored tensors that the prepared ones hold in another form, so that
    a layer can give them up until `stored` brings them back; most: how many linears of one input it runs at once;
    dtypes: of the activations that it can take; opaque: whether torch.compile sees it as one operator.
    """

    name: str
    replaces: tuple[str, ...] = ()
    most: int = 1
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    opaque: bool = True

    @abstractmethod
    def refusal(self, layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it does not run this layer on activations of this dtype, in words; None if it does."""

    @abstractmethod
    def prepare(self, linears: Sequence[PackedLinear], dtype: torch.dtype) -> list[Tensor]:
        """Return the tensors that running these linears, which read one input, takes. They must agree in their specs."""

    @abstractmethod
    def channels(self, tensors: Sequence[Tensor], group_size: int) -> int:
        """Return C, the input channels of the linears from which these tensors were prepared."""

    @abstractmethod
    def compute(
        self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, sizes: Sequence[int], group_size: int
    ) -> Tensor:
        """Multiply: x [M, C] → [M, N] in x's dtype. tensors: those that `prepare` returned; bias: [N] in x's dtype; sizes: out_features of each."""

    @abstractmethod
    def input_gradient(self, grad: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int], group_size: int) -> Tensor:
        """Pass a gradient back to the input: grad [M, N] → grad · Ŵ, [M, C]."""

    def batches(self, linears: Sequence[PackedLinear]) -> list[list[PackedLinear]]:
        """Return the linears of one input, cut into what runs at once."""
        return [list(linears[i : i + self.most]) for i in range(0, len(linears), self.most)]

    def stored(
        self, tensors: Sequence[Tensor], sizes: Sequence[int], index: int, layout: LinearLayout
    ) -> dict[str, Tensor]:
        """Return the tensors named in `replaces` of one linear, bit for bit as they were loaded."""
        return {}


@dataclass(frozen=True)
class Prepared:
    """Linears of one input that run at once. backend: its name; out_features: of each linear."""

    backend: str
    tensors: list[Tensor]
    out_features: tuple[int, ...]
    group_size: int
