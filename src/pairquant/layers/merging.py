"""Layers that read the same input: merged, so that their backend runs them in one launch."""

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
    """Layers that read the same input: the first one called computes for all, the others take their share.

    What was computed is handed out only for the very same tensor, unchanged since, in the same gradient mode, and is
    dropped as soon as every layer has had its part; any other input is computed anew. In inference mode and inside a
    compiled graph changes cannot be seen: there nobody may change x in place between two of the layers.

    backend: who runs them, once it has replaced their stored tensors; None before.
    """

    def __init__(self, members: Sequence[RotatedLinear]):
        self.members = list(members)
        self.backend: Backend | None = None
        self.tensors: list[Tensor] = []
        self.sizes = [member.out_features for member in self.members]
        self.bias: Tensor | None = None
        self.latest: _Computed | None = None

    def forward(self, member: RotatedLinear, x: Tensor) -> Tensor:
        if len(self.members) == 1:
            return self._linear(x)
        index = next(i for i, other in enumerate(self.members) if other is member)
        latest = self.latest  # read once: another thread may put its own there at any moment
        y = latest.share(index, x) if latest is not None else None
        if latest is None or y is None:
            latest = self.latest = _Computed(x, _state(x), list(self._linear(x).split(self.sizes, dim=-1)))
            y = latest.share(index, x)
        assert y is not None, "a share of what was just computed is there"
        if all(other is None for other in latest.waiting):
            self.latest = None
        return y

    def gathered(self) -> bool:
        """Return whether all stored tensors are on one device, to stay."""
        devices = {tensor.device for member in self.members for tensor in member.buffers()}
        return len(devices) == 1 and not any(map(offloaded, self.members))

    def build(self, backend: Backend) -> None:
        """Let the backend prepare all members; they give up the stored tensors that it replaces."""
        with plain_tensors():
            self.tensors = backend.prepare([member.packed for member in self.members], self.members[0].dtype)
            if any(member.bias is not None for member in self.members):
                parts = [m.bias if m.bias is not None else m.scales.new_zeros(m.out_features) for m in self.members]
                self.bias = torch.cat(parts)
        self.backend = backend
        for member in self.members:
            for name in backend.replaces:  # empty, but on the right device, by which PEFT places its adapters
                member._buffers[name] = getattr(member, name).new_empty(0)

    def stored(self, member: RotatedLinear) -> dict[str, Tensor]:
        """Return the tensors that `member` gave up; none before `build`."""
        if self.backend is None:
            return {}
        return self.backend.stored(self.tensors, self.sizes, self.members.index(member), member.layout)

    def dissolve(self) -> None:
        """Give every member its stored tensors back."""
        self.latest = None
        for member in self.members:
            member._buffers.update(self.stored(member))
        self.backend, self.tensors, self.bias = None, [], None

    def _linear(self, x: Tensor) -> Tensor:
        assert self.backend is not None, "merged layers run once they are built"
        return run(self.backend, x, self.tensors, self.bias, self.sizes, self.members[0].layout.group_size)


@dataclass
class _Computed:
    """What merged layers gave for x in a state: the shares that were not fetched yet."""

    x: Tensor
    state: tuple[int, bool, bool]
    waiting: list[Tensor | None]

    def share(self, index: int, x: Tensor) -> Tensor | None:
        """Return a layer's share, once; None if this is another input, or the share is gone."""
        if self.x is not x or self.state != _state(x):
            return None
        y, self.waiting[index] = self.waiting[index], None
        return y


def _state(x: Tensor) -> tuple[int, bool, bool]:
    """Return what must not have changed since: the values, counted by changes in place, and whether gradients are recorded.

    Changes of inference mode and inside a compiled graph cannot be counted.
    """
    version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
    return version, x.requires_grad, torch.is_grad_enabled()


def plain_tensors() -> AbstractContextManager:
    """No gradients, and tensors that may be saved for gradients later, also when made in inference mode."""
    return torch.no_grad() if torch.compiler.is_compiling() else torch.inference_mode(False)


def offloaded(layer: nn.Module) -> bool:
    """Return whether accelerate brings the stored tensors for each forward and takes them away after it."""
    hook = getattr(layer, "_hf_hook", None)
    return getattr(hook, "offload", False) and getattr(hook, "offload_buffers", False)
