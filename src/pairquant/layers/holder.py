"""The base of modules whose buffers are a packed weight, under the stored names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..spec.linear import LinearLayout


class HoldsPacked(nn.Module):
    """A module with the tensors of a layout as buffers. What prepares them for running may take their place meanwhile.

    `.to(dtype)`, `.half()` and the like do not change the dtypes of the buffers, so that the module is saved with the same
    bits that were loaded. They change `dtype`, the dtype that it computes in.
    """

    theta: Tensor

    def __init__(self, layout: LinearLayout, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.layout, self.dtype = layout, dtype
        for name, stored in layout.fields().items():
            self.register_buffer(name, torch.empty(stored.shape, dtype=stored.dtype, device=device))

    def _restore(self) -> None:
        """Put the stored tensors back where something else has taken their place; here nothing does."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        """Apply `fn`, but keep the buffers' dtypes if it changes them: a scale in bfloat16 would lose stored bits."""
        self._restore()
        stored = dict(self._buffers)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.theta.device)).dtype
        super()._apply(fn, recurse)
        for name, before in stored.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)
