"""The module that runs a packed linear inside a model, and the swap that puts it there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .core.linear import decode
from .layout import LinearLayout, PackedLinear


class RotatedLinear(nn.Module):
    """A linear layer whose buffers are a `PackedLinear`, under the stored names, shapes and dtypes.

    forward: x [..., C] floating → [..., N] in x's dtype. For now the weight is decoded once, on first use, into
    x's dtype and multiplied as it is: the speed and run-time memory of an unquantized layer. The buffers keep their
    dtypes through `.to(dtype)`, `.half()` and the like, so that saving gives back the bits that were loaded.
    """

    qweight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, layout: LinearLayout, device: torch.device | str | None = None):
        super().__init__()
        self.layout = layout
        self.in_features, self.out_features = layout.in_features, layout.out_features
        for name, stored in layout.fields().items():
            self.register_buffer(name, torch.empty(stored.shape, dtype=stored.dtype, device=device))
        if not layout.bias:
            self.bias = None
        self._dense: Tensor | None = None

    @classmethod
    def from_packed(cls, packed: PackedLinear) -> RotatedLinear:
        """A module that holds these tensors."""
        module = cls(packed.layout, device="meta")
        for name, tensor in packed.tensors().items():
            setattr(module, name, tensor)
        return module

    @property
    def packed(self) -> PackedLinear:
        """The stored form, sharing memory with the buffers."""
        return PackedLinear(self.layout, **{name: getattr(self, name) for name in self.layout.fields()})

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight in the original basis, [N, C], kept for the next call."""
        dense = self._dense
        if dense is None or dense.dtype != dtype or dense.device != self.qweight.device:
            with torch.no_grad():
                self._dense = dense = decode(self.packed).to(dtype)
        return dense

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.dense_weight(x.dtype), bias)

    def extra_repr(self) -> str:
        s = self.layout
        return f"{s.in_features} → {s.out_features}, {s.bits} bits, group {s.group_size}, {s.rotations} rotations"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        """Follow `fn` to another device, never to another dtype: a bfloat16 scale would lose stored bits."""
        stored = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in stored.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        self._dense = None
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._dense = None


def rotated_linears(model: nn.Module) -> Iterator[tuple[str, RotatedLinear]]:
    """Path and module of every quantized linear."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, RotatedLinear))


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
