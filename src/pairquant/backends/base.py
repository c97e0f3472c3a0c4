"""The interface of a backend, which says which layers it accepts, prepares their weights, and runs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.run.norm import Norm
from ..spec.linear import LinearLayout, PackedLinear


class Backend(ABC):
    """One way to run quantized linears.

    name: its name for users and in operators.
    replaces: names of stored tensors that the prepared tensors hold in another form. A layer can free those of them that it
    has, because `stored` can restore them.
    most: how many linears that read the same input it can run at once.
    dtypes: the dtypes of activations that it accepts.
    opaque: whether torch.compile sees it as a single operator.
    joins: whether it is worth running layers of one input at once although their stored tensors are not replaced.
    """

    name: str
    replaces: tuple[str, ...] = ()
    most: int = 1
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    opaque: bool = True
    joins: bool = False

    @abstractmethod
    def refusal(self, layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return the reason, in words, why the backend does not run this layer on this device; None if it does.

        dtype: that of the activations.
        """

    @abstractmethod
    def prepare(self, linears: Sequence[PackedLinear], dtype: torch.dtype) -> list[Tensor]:
        """Return the tensors that `compute` needs to run these linears on activations of this dtype.

        The linears must read the same input and have equal specs.
        """

    @abstractmethod
    def channels(self, tensors: Sequence[Tensor], group_size: int) -> int:
        """Return C, the number of input channels of the linears from which `prepare` made these tensors."""

    @abstractmethod
    def compute(
        self,
        x: Tensor,
        tensors: Sequence[Tensor],
        bias: Tensor | None,
        sizes: Sequence[int],
        group_size: int,
        activations: str | None = None,
    ) -> Tensor:
        """Run the linears on x [M, C]: [M, N] in x's dtype, where N is the sum of all out_features.

        tensors: what `prepare` returned; bias: [N] in x's dtype, or None; sizes: out_features of each linear; activations: the
        format that the rotated x is rounded to (`spec.activations`), None for none.
        """

    def fuses(self, before: str, layout: LinearLayout, dtype: torch.dtype) -> bool:
        """Tell whether what comes before a layer is faster as a part of it.

        before: "norm" for a residual and an RMSNorm, "silu" for silu(gate) · up; dtype: that of the activations. The next two
        methods are right whatever is returned here.
        """
        return False

    def compute_after_norm(
        self,
        x: Tensor,
        residual: Tensor,
        norm: Norm,
        tensors: Sequence[Tensor],
        bias: Tensor | None,
        sizes: Sequence[int],
        group_size: int,
    ) -> tuple[Tensor, Tensor]:
        """Run the linears on the norm of h = x + residual: [M, N], and h [M, C].

        x, residual: [M, C] of one dtype, which the results and the norm's output have too. The other arguments are those of
        `compute`.
        """
        normed, h = norm.of_sum(x, residual)
        return self.compute(normed, tensors, bias, sizes, group_size), h

    def compute_after_silu(
        self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, sizes: Sequence[int], group_size: int
    ) -> Tensor:
        """Run the linears on silu(gate) · up, where x [M, 2 C] is gate and up side by side: [M, N]; see `compute`."""
        gate, up = x.chunk(2, -1)
        return self.compute(F.silu(gate) * up, tensors, bias, sizes, group_size)

    @abstractmethod
    def input_gradient(self, grad: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int], group_size: int) -> Tensor:
        """Compute the gradient of the input, grad · Ŵ [M, C], from that of the output, grad [M, N]."""

    def simulates(self, layout: LinearLayout, device: torch.device) -> bool:
        """Tell whether the activations are rounded to the layer's format, but multiplied in 16 or 32 bits: no faster for it."""
        return layout.activations is not None

    def batches(self, linears: Sequence[PackedLinear]) -> list[list[PackedLinear]]:
        """Split the linears that read the same input into lists of linears that run at once."""
        return [list(linears[i : i + self.most]) for i in range(0, len(linears), self.most)]

    def stored(
        self, tensors: Sequence[Tensor], sizes: Sequence[int], index: int, layout: LinearLayout
    ) -> dict[str, Tensor]:
        """Return the tensors named in `replaces` of the linear `index`, bit for bit as they were loaded."""
        return {}


@dataclass(frozen=True)
class Prepared:
    """Linears that read the same input, prepared to run at once.

    backend: the name of the backend; tensors: what its `prepare` returned; out_features: of each linear; activations: the
    format that the rotated input is rounded to, None for none.
    """

    backend: str
    tensors: list[Tensor]
    out_features: tuple[int, ...]
    group_size: int
    activations: str | None = None
