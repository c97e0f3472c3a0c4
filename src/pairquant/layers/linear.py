"""The module that runs a packed linear inside a model, and the swap that puts it there."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.run import cpu, ops
from ..spec.linear import TENSOR_NAMES, LinearLayout, PackedLinear
from .merging import Merged, offloaded, plain_tensors


class RotatedLinear(nn.Module):
    """A linear layer whose buffers are a `PackedLinear`, under the stored names, shapes and dtypes.

    forward: x [..., C] floating → [..., N] in x's dtype, by

    - the Triton kernels, on NVIDIA GPUs at 4 bits: the stored tensors are then repacked in place of the originals, and
      come back bit for bit for saving and moving;
    - PyTorch's int4 product with a folded rotation, on CPUs in bfloat16 at 4 bits;
    - a dense weight, decoded once and kept, everywhere else.

    What is kept is made on the first forward. Compiled before that, a model is compiled twice: with the making, then
    without.

    The buffers keep their dtypes through `.to(dtype)`, `.half()` and the like, so that saving gives back the bits that
    were loaded; `dtype`, what the layer computes in, follows.
    """

    qweight: Tensor
    scales: Tensor
    theta: Tensor
    bias: Tensor | None

    def __init__(
        self, layout: LinearLayout, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        self.layout, self.dtype = layout, dtype
        self.in_features, self.out_features = layout.in_features, layout.out_features
        for name, stored in layout.fields().items():
            self.register_buffer(name, torch.empty(stored.shape, dtype=stored.dtype, device=device))
        if not layout.bias:
            self.bias = None
        self._dense: Tensor | None = None
        self._int4: list[Tensor] | None = None
        self._merged = Merged([self])

    @classmethod
    def from_packed(cls, packed: PackedLinear) -> RotatedLinear:
        """A module that holds these tensors."""
        module = cls(packed.layout, device="meta")
        for name, tensor in packed.tensors().items():
            setattr(module, name, tensor)
        return module

    @property
    def packed(self) -> PackedLinear:
        """The stored form; shares memory with the buffers, except where the kernels' layout has replaced them."""
        return PackedLinear(self.layout, **self._stored())

    def forward(self, x: Tensor) -> Tensor:
        if self._merged.weights is not None or (x.is_cuda and self.prepare()):
            return self._merged.forward(self, x)
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        if x.device.type == "cpu" and cpu.available(self.layout, x.dtype):
            return torch.ops.pairquant.rotated_linear(
                x, self._int4_weights(), bias, [self.out_features], self.layout.group_size
            )
        return F.linear(x, self.dense_weight(x.dtype), bias)

    def prepare(self) -> bool:
        """Repack for the Triton kernels, with the siblings, if this is a 4-bit layer on a GPU that has them.

        Done on the first forward otherwise; call it before that is captured in a graph or compiled.
        """
        if self._merged.weights is None:
            if self.theta.is_cuda and len(self._merged.members) > 1 and not self._merged.gathered("cuda"):
                self.leave_siblings()  # they are elsewhere
            if self.layout.bits != 4 or not self._merged.gathered("cuda"):
                return False
            if reason := ops.triton_missing():
                warnings.warn(f"4-bit layers run as dense layers: {reason}.", stacklevel=2)
                return False
            self._merged.build()
        return True

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight in the original basis, [N, C], kept for the next call."""
        dense = self._dense
        if dense is None or dense.dtype != dtype or dense.device != self.theta.device:
            with plain_tensors():
                dense = self._decoded().to(dtype)
            self._dense = None if offloaded(self) else dense
        return dense

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """A plain, frozen layer with the decoded weight."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self._decoded().to(dtype), requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return dense

    def leave_siblings(self) -> None:
        """Merge with no other layer any more; those it was merged with stay together."""
        merged = self._merged
        merged.dissolve()
        self._merged = Merged([self])
        rest = Merged([member for member in merged.members if member is not self])
        for member in rest.members:
            member._merged = rest

    def _int4_weights(self) -> list[Tensor]:
        """`CpuWeights.tensors()`, kept for the next call."""
        int4 = self._int4
        if int4 is None:
            with plain_tensors():
                int4 = torch.ops.pairquant.cpu_weights(self._operands(), self.layout.group_size)
            self._int4 = None if offloaded(self) else int4
        return int4

    def _decoded(self) -> Tensor:
        """Float32 [N, C]."""
        return torch.ops.pairquant.decode(self._operands(), self.layout.bits, self.layout.group_size)

    def _operands(self) -> list[Tensor]:
        """The stored tensors but the bias, in the order that the operators take them."""
        stored = self._stored()
        return [stored[name] for name in TENSOR_NAMES if name != "bias"]

    def extra_repr(self) -> str:
        s = self.layout
        return f"{s.in_features} → {s.out_features}, {s.bits} bits, group {s.group_size}, {s.rotations} rotations"

    def _stored(self) -> dict[str, Tensor]:
        """Stored name → tensor."""
        repacked = self._merged.stored(self) if self._merged.weights is not None else {}
        return {name: repacked.get(name, getattr(self, name)) for name in self.layout.fields()}

    def _restore(self) -> None:
        """Back to the stored tensors, in this layer and those it is merged with."""
        self._merged.dissolve()
        self._dense = self._int4 = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        """Follow `fn` to another device, never to another dtype: a bfloat16 scale would lose stored bits."""
        self._restore()
        stored = dict(self._buffers)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.theta.device)).dtype
        super()._apply(fn, recurse)
        for name, before in stored.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._merged.weights is not None:
            destination.update({prefix + name: tensor for name, tensor in self._merged.stored(self).items()})

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)
