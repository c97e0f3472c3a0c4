"""Merge layers that read the same input, so that their backend runs them in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..backends.base import Backend
from ..backends.ops import run

if TYPE_CHECKING:
    from .linear import RotatedLinear


class Merged:
    """Layers that read the same input. The first one that is called computes the outputs of all; the others fetch theirs.

    A layer gets a computed output only if its input is the same tensor object, unchanged since, with gradients recorded or
    not as before. For any other input, all outputs are computed again. The outputs are freed when every layer has fetched
    its own. In inference mode and inside a compiled graph, changes of x cannot be detected: there, x must not be changed in
    place between the calls of two of the layers.

    backend: the backend that runs the layers, after it has prepared them; None before.
    """

    def __init__(self, members: Sequence[RotatedLinear]):
        self.members = list(members)
        self.backend: Backend | None = None
        self.tensors: list[Tensor] = []
        self.sizes = [member.out_features for member in self.members]
        self.bias: Tensor | None = None
        self.latest: _Computed | None = None

    def forward(self, member: RotatedLinear, x: Tensor) -> Tensor:
        """Return the output of one of the layers, computing those of all unless this was done: x [..., C] → [..., N]."""
        if len(self.members) == 1:
            return self._linear(x)
        index = next(i for i, other in enumerate(self.members) if other is member)
        latest = self.latest  # read once: another thread may replace it at any moment
        y = latest.share(index, x) if latest is not None else None
        if latest is None or y is None:
            latest = self.latest = _Computed(x, _state(x), list(self._linear(x).split(self.sizes, dim=-1)))
            y = latest.share(index, x)
        assert y is not None, "a share of what was just computed is there"
        if all(other is None for other in latest.waiting):
            self.latest = None
        return y

    def gathered(self) -> bool:
        """Tell whether the stored tensors of all layers are on the same device and are not offloaded."""
        devices = {tensor.device for member in self.members for tensor in member.buffers()}
        return len(devices) == 1 and not any(map(offloaded, self.members))

    def serves(self, x: Tensor) -> bool:
        """Tell whether the layers are prepared, and run x as they are: if their stored tensors are there, others may."""
        return self.backend is not None and (bool(self.backend.replaces) or x.dtype in self.backend.dtypes)

    def join(self, backend: Backend) -> bool:
        """Let a backend that replaces no stored tensors prepare all layers to run at once, if it can. Tells whether it did.

        It is not done while torch.compile traces, because the values of the layers' transforms are compared.
        """
        if not backend.joins or len(self.members) == 1 or torch.compiler.is_compiling() or not self.gathered():
            return False
        if len(backend.batches([member.packed for member in self.members])) > 1:
            return False
        self.build(backend)
        return True

    def build(self, backend: Backend) -> None:
        """Let the backend prepare all layers, and free the stored tensors that it replaces."""
        with plain_tensors():
            self.tensors = backend.prepare([member.packed for member in self.members], self.members[0].dtype)
            if any(member.bias is not None for member in self.members):
                parts = [
                    m.bias if m.bias is not None else m.scales.new_zeros(m.out_features, dtype=torch.float16)
                    for m in self.members
                ]
                self.bias = torch.cat(parts)
        self.backend = backend
        for member in self.members:
            fields = member.layout.fields()
            for name in backend.replaces:
                if name in fields:  # weights in MXFP4 have no zero points
                    # an empty tensor keeps the device, where PEFT then puts its adapters
                    member._buffers[name] = getattr(member, name).new_empty(0)

    def stored(self, member: RotatedLinear) -> dict[str, Tensor]:
        """Return the stored tensors that `build` freed in this layer; an empty dict before `build`."""
        if self.backend is None:
            return {}
        return self.backend.stored(self.tensors, self.sizes, self.members.index(member), member.layout)

    def dissolve(self) -> None:
        """Restore the stored tensors of every layer."""
        self.latest = None
        for member in self.members:
            member._buffers.update(self.stored(member))
        self.backend, self.tensors, self.bias = None, [], None

    def _linear(self, x: Tensor) -> Tensor:
        assert self.backend is not None, "merged layers run once they are built"
        layout = self.members[0].layout
        return run(self.backend, x, self.tensors, self.bias, self.sizes, layout.group_size, layout.activations)


@dataclass
class _Computed:
    """The outputs that merged layers computed for x. waiting: the output of each layer; None after it was fetched."""

    x: Tensor
    state: tuple[int, bool, bool]
    waiting: list[Tensor | None]

    def share(self, index: int, x: Tensor) -> Tensor | None:
        """Return the output of a layer; None if x is another input or has changed, or if the output was fetched before."""
        if self.x is not x or self.state != _state(x):
            return None
        y, self.waiting[index] = self.waiting[index], None
        return y


def _state(x: Tensor) -> tuple[int, bool, bool]:
    """Return what must be the same for a computed output to be used.

    It consists of the number of changes of x in place, and of whether gradients are recorded. In inference mode and inside
    a compiled graph, PyTorch does not count changes.
    """
    version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
    return version, x.requires_grad, torch.is_grad_enabled()


def plain_tensors() -> AbstractContextManager:
    """Return a context for making tensors that autograd may save later, even if inference mode is on outside.

    Tensors that are made in inference mode could not be saved.
    """
    return torch.no_grad() if torch.compiler.is_compiling() else torch.inference_mode(False)


def offloaded(layer: nn.Module) -> bool:
    """Tell whether accelerate loads the stored tensors for each forward pass and removes them after it."""
    hook = getattr(layer, "_hf_hook", None)
    return getattr(hook, "offload", False) and getattr(hook, "offload_buffers", False)
