"""The module that runs a packed linear inside a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..backends.base import Backend
from ..backends.dense import decoded
from ..backends.ops import run
from ..backends.table import DENSE, choose, explain
from ..spec.linear import LinearLayout, PackedLinear
from .merging import Merged, offloaded, plain_tensors


class RotatedLinear(nn.Module):
    """A linear layer whose buffers are a `PackedLinear`, under the stored names, shapes and dtypes.

    forward: x [..., C] floating → [..., N] in x's dtype, by the first backend that takes the layer on x's device and in
    x's dtype (`backends.table`). On NVIDIA GPUs it takes the place of the stored tensors, which come back bit for bit
    for saving and moving; elsewhere what it needs is kept beside them.

    What is kept is made on the first forward. Compiled before that, a model is compiled twice: with the making, then
    without.

    The buffers keep their dtypes through `.to(dtype)`, `.half()` and the like, so that saving gives back the bits that
    were loaded; `dtype`, what the layer computes in, follows.
    """

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
        #: Whether the layer it stands for was `nn.Linear`, whose weight is [N, C].
        self.stands_for_linear = True
        self._kept: _Kept | None = None
        self._merged = Merged([self])

    @classmethod
    def from_packed(cls, packed: PackedLinear) -> RotatedLinear:
        """Return a module that holds these tensors."""
        module = cls(packed.layout, device="meta")
        for name, tensor in packed.tensors.items():
            setattr(module, name, tensor)
        return module

    @property
    def packed(self) -> PackedLinear:
        """The stored form; shares memory with the buffers, except where a backend has replaced them."""
        given_up = self._merged.stored(self)
        return PackedLinear(self.layout, {n: given_up.get(n, getattr(self, n)) for n in self.layout.fields()})

    def forward(self, x: Tensor) -> Tensor:
        if self._merged.backend is not None or (x.is_cuda and self.prepare()):
            return self._merged.forward(self, x)
        kept = self._kept_for(x)
        return run(kept.backend, x, kept.tensors, self.bias, [self.out_features], self.layout.group_size)

    def prepare(self) -> bool:
        """Let the backend take the place of the stored tensors, with the siblings; False where none does so.

        Done on the first forward otherwise; call it before that is captured in a graph or compiled.
        """
        if self._merged.backend is None:
            device = self.theta.device
            if device.type == "cuda" and len(self._merged.members) > 1 and not self._merged.gathered():
                self.leave_siblings()  # they are elsewhere
            backend = choose(self.layout, device, self.dtype)
            if backend is DENSE and device.type == "cuda":
                reasons = explain(self.layout, device, self.dtype).refusals
                warnings.warn(
                    f"layers of {self.layout.bits} bits run decoded, in 16 bits or more: "
                    + "; ".join(f"{name} {reason}" for name, reason in reasons.items()),
                    stacklevel=2,
                )
            if not backend.replaces or not self._merged.gathered():
                return False
            self._merged.build(backend)
        return True

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """Return a plain, frozen layer with the decoded weight."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(decoded(self.packed).to(dtype), requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return dense

    def merge_into(self, merged: Merged) -> None:
        """Run with the other layers of `merged` from now on."""
        self._restore()
        self._merged = merged

    def leave_siblings(self) -> None:
        """Merge with no other layer any more; those it was merged with stay together."""
        merged = self._merged
        merged.dissolve()
        self._merged = Merged([self])
        rest = Merged([member for member in merged.members if member is not self])
        for member in rest.members:
            member._merged = rest

    def _kept_for(self, x: Tensor) -> _Kept:
        """Return what a backend that leaves the stored tensors in place needs for activations like x, kept for the next call."""
        kept = self._kept
        if kept is None or not kept.serves(x, self.theta.device):
            backend = choose(self.layout, self.theta.device, x.dtype)
            if backend.replaces:  # it could not take their place
                backend = DENSE
            with plain_tensors():
                kept = _Kept(backend, x.dtype, self.theta.device, backend.prepare([self.packed], x.dtype))
            self._kept = None if offloaded(self) else kept
        return kept

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.layout.spec}"

    def _restore(self) -> None:
        """Back to the stored tensors, in this layer and those it is merged with."""
        self._merged.dissolve()
        self._kept = None

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
        destination.update({prefix + name: tensor for name, tensor in self._merged.stored(self).items()})

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)


class _Kept:
    """What one layer keeps beside its stored tensors, to run activations of a dtype on a device."""

    def __init__(self, backend: Backend, dtype: torch.dtype, device: torch.device, tensors: list[Tensor]):
        self.backend, self.dtype, self.device, self.tensors = backend, dtype, device, tensors

    def serves(self, x: Tensor, device: torch.device) -> bool:
        """Return whether it is for activations like x, of a layer that is on this device now."""
        return self.dtype == x.dtype and self.device == device
