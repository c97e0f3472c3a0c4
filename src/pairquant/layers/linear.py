"""The module that runs a packed linear inside a model."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ..backends.base import Backend
from ..backends.dense import decoded
from ..backends.ops import run
from ..backends.table import DENSE, choose, explain
from ..spec.linear import LinearLayout, PackedLinear
from .holder import HoldsPacked
from .merging import Merged, offloaded, plain_tensors


class RotatedLinear(HoldsPacked):
    """A linear layer whose buffers are a `PackedLinear`, under the stored names, shapes and dtypes.

    `forward` takes x, floating [..., C], and returns [..., N] in x's dtype. The layer is run by the first backend that
    accepts it for x's device and dtype (`backends.table`). The tensors that `triton_kernels` prepares replace stored tensors,
    which are restored bit for bit when the layer is saved or moved. With the other backends, the layer, or all that it is
    merged with, keeps the prepared tensors in addition to the stored ones.

    The first forward pass prepares the tensors. If a model is compiled before that, it is compiled twice: once with the
    preparation and once without.
    """

    scales: Tensor
    bias: Tensor | None

    def __init__(
        self, layout: LinearLayout, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ):
        super().__init__(layout, device, dtype)
        self.in_features, self.out_features = layout.in_features, layout.out_features
        if not layout.bias:
            self.bias = None
        #: Whether this layer replaces an `nn.Linear`, whose weight is [N, C]; False for `Conv1D`, whose weight is [C, N].
        self.stands_for_linear = True
        self._kept: _Kept | None = None
        self._merged = Merged([self])

    @classmethod
    def from_packed(cls, packed: PackedLinear) -> RotatedLinear:
        """Make a layer that holds the tensors of `packed`."""
        module = cls(packed.layout, device="meta")
        for name, tensor in packed.tensors.items():
            setattr(module, name, tensor)
        return module

    @property
    def packed(self) -> PackedLinear:
        """The tensors in their stored form; they share memory with the buffers, except those that a backend replaced."""
        given_up = self._merged.stored(self)
        return PackedLinear(self.layout, {n: given_up.get(n, getattr(self, n)) for n in self.layout.fields()})

    def forward(self, x: Tensor) -> Tensor:
        if self._merged.serves(x) or (x.is_cuda and self.prepare()):
            return self._merged.forward(self, x)
        kept = self._kept_for(x)
        if kept is None:
            return self._merged.forward(self, x)
        layout = self.layout
        return run(kept.backend, x, kept.tensors, self.bias, [self.out_features], layout.group_size, layout.activations)

    def prepare(self) -> bool:
        """Let the backend's tensors replace the stored ones, here and in the layers that this one is merged with.

        The first forward pass on a GPU does this if it was not done before. Call it before that pass is captured in a
        CUDA graph or compiled. Returns False if no stored tensors were replaced. Warns if the layer runs
        decoded on a GPU.
        """
        if self._merged.backend is None:
            device = self.theta.device
            if device.type == "cuda" and len(self._merged.members) > 1 and not self._merged.gathered():
                self.leave_siblings()  # the others are on another device
            backend = choose(self.layout, device, self.dtype)
            if backend is DENSE and device.type == "cuda":
                reasons = explain(self.layout, device, self.dtype).refusals
                inputs = f" with {self.layout.activations} activations" if self.layout.activations else ""
                warnings.warn(
                    f"layers of {self.layout.bits} bits{inputs} are decoded to run, and take the memory of 16 bits or more: "
                    + "; ".join(f"{name} {reason}" for name, reason in reasons.items()),
                    stacklevel=2,
                )
            if not backend.replaces or not self._merged.gathered():
                return False
            self._merged.build(backend)
        return bool(self._merged.backend and self._merged.backend.replaces)

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """Return an `nn.Linear` with the decoded weight in this dtype; its parameters need no gradient.

        Warns if this layer rounds what it reads: an `nn.Linear` does not.
        """
        if self.layout.activations is not None:
            warnings.warn(
                f"the quantized layers round what they read to {self.layout.activations}, for which their weights were fitted; "
                "the plain layers made of them read it as it is and answer a little differently. To keep the rounding, keep "
                "the quantized layers.",
                stacklevel=2,
            )
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(decoded(self.packed).to(dtype), requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return dense

    def merge_into(self, merged: Merged) -> None:
        """Run this layer together with the other layers of `merged` from now on."""
        self._restore()
        self._merged = merged

    def leave_siblings(self) -> None:
        """Run this layer alone from now on; the layers that it was merged with stay merged."""
        merged = self._merged
        merged.dissolve()
        self._merged = Merged([self])
        rest = Merged([member for member in merged.members if member is not self])
        for member in rest.members:
            member._merged = rest

    def _kept_for(self, x: Tensor) -> _Kept | None:
        """Return the tensors that the backend needs to run activations like x, and keep them for the next call.

        This is for backends that do not replace the stored tensors. Returns None if the layers that this one is merged with
        were prepared instead, to run at once.
        """
        kept = self._kept
        if kept is None or not kept.serves(x, self.theta.device):
            backend = choose(self.layout, self.theta.device, x.dtype)
            if backend.replaces:  # its tensors could not replace the stored ones
                backend = DENSE
            if self._merged.join(backend):
                return None
            with plain_tensors():
                kept = _Kept(backend, x.dtype, self.theta.device, backend.prepare([self.packed], x.dtype))
            self._kept = None if offloaded(self) else kept
        return kept

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.layout.spec}"

    def _restore(self) -> None:
        """Restore the stored tensors in this layer and in those that it is merged with."""
        self._merged.dissolve()
        self._kept = None

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self._merged.stored(self).items()})


class RotatedHead(RotatedLinear):
    """An output embedding. Some models (Mamba) ask its weight for the dtype in which it wants its input."""

    @property
    def weight(self) -> Tensor:
        """An empty tensor of the dtype and on the device that the layer computes in."""
        return torch.empty(0, dtype=self.dtype, device=self.theta.device)


class _Kept:
    """The tensors that a layer keeps in addition to its stored ones, to run activations of a dtype on a device."""

    def __init__(self, backend: Backend, dtype: torch.dtype, device: torch.device, tensors: list[Tensor]):
        self.backend, self.dtype, self.device, self.tensors = backend, dtype, device, tensors

    def serves(self, x: Tensor, device: torch.device) -> bool:
        """Tell whether the tensors can run activations like x, while the layer is on this device."""
        return self.dtype == x.dtype and self.device == device
