"""Launch `gluon_overlapped.overlapped_kernel`, which unpacks weights while the tensor cores multiply, on Hopper GPUs."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ...support.devices import current
from .launch import cdiv, dependent, multiprocessors, rotate_padded, scratch, segments
from .table import Overlapped
from .weights import KernelWeights

#: Rows of a tile.
ROWS = 128


@lru_cache
def available(device: torch.device) -> bool:
    """Tell whether the device has the instructions, and the installed Triton the language, of the kernel."""
    hopper = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) == (9, 0)
    return hopper and find_spec("triton.experimental.gluon") is not None


def runs(x: Tensor, weights: KernelWeights) -> bool:
    """Tell whether the kernel can multiply x by these weights: 16 bits by 4, on a GPU for which it is `available`."""
    return weights.bits == 4 and x.element_size() == 2 and available(x.device)


def linear(x: Tensor, weights: KernelWeights, bias: Tensor | None, choice: Overlapped) -> Tensor:
    """Do as `launch.linear`; the caller has asked whether it `runs`."""
    return product(rotate_padded(x, weights.rotation, wide=True, overlap=_overlaps(weights)), weights, bias, choice)


def product(x_rot: Tensor, weights: KernelWeights, bias: Tensor | None, choice: Overlapped) -> Tensor:
    """Multiply by the rotated weight, without rotating; x_rot: 16-bit [T, M, 128 KB], the channels in `mma_order`."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .gluon_overlapped import overlapped_kernel

    layout = weights.layout
    transforms, tokens, width = x_rot.shape
    device = x_rot.device
    out = torch.empty(tokens, sum(weights.out_features), dtype=x_rot.dtype, device=device)
    tiles = layout.padded_rows // ROWS * cdiv(tokens, choice.tokens)
    programs = min(multiprocessors(device), tiles * layout.k_blocks)
    partial = out if tiles % programs == 0 else scratch(device, programs, 2, ROWS, choice.tokens)
    with current(device):
        overlapped_kernel[(programs,)](
            TensorDescriptor.from_tensor(x_rot.view(-1, width), [choice.tokens, 64], NVMMASharedLayout(128, 16, 2)),
            weights.words,
            weights.grid,
            out if bias is None else bias,
            out,
            partial,
            weights.arrivals,
            tokens,
            layout.k_blocks,
            layout.padded_rows // 128,
            out.shape[1] // 8,
            *segments(layout),
            BM=choice.tokens,
            STAGES=choice.stages,
            GROUPS=layout.groups_per_block,
            SHARED=transforms == 1,
            HAS_BIAS=bias is not None,
            num_warps=choice.warps,
            **dependent(device, _overlaps(weights)),
        )
    return out


def _overlaps(weights: KernelWeights) -> bool:
    return weights.rotation.transforms == 1  # for the reason see `launch._overlaps`
