"""Fast functions for fitting and rounding weights: Triton kernels for CUDA tensors, the functions of `core` for others.

`compensate`, `descend`, `fake_quantize_forward` and `fake_quantize_backward` always start the kernels; in Triton's
interpreter, the tensors may be on a CPU. These functions need Triton, but importing this module does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import grid as quantizer
from ...core import rounding
from ...core.grid import MIN_SCALE
from ...core.rounding import Solvers
from ...support.devices import current
from ...support.errors import KernelError
from ..availability import triton_missing

#: Rows per program, which is one warp: four lanes share a row of 128 columns, so each holds 32 values in registers. With 16
#: rows, the compiler for sm_90 moves values from registers to memory.
ROWS = 8
#: Weights per program of fake quantization.
TILE = 4096


def solvers(device: torch.device) -> Solvers:
    """Return the loops of GPTQ and refinement to use for tensors on this device: the kernels on a GPU, if Triton is there."""
    return Solvers(compensate, descend) if _by_triton(device) else rounding.SOLVERS


def fake_quantize(w: Tensor, bits: int, group_size: int, symmetric: bool = False) -> Tensor:
    """Do the same as `core.grid.fake_quantize`, by kernels if w [N, C] is float32 on a GPU; differentiable."""
    if w.dtype == torch.float32 and _by_triton(w.device):
        return FakeQuantize.apply(w, bits, group_size, symmetric)
    return quantizer.fake_quantize(w, bits, group_size, symmetric)


class FakeQuantize(torch.autograd.Function):
    """The same as `core.grid.FakeQuantize`, but keeps only w and computes range and codes again for the gradient."""

    @staticmethod
    def forward(ctx, w: Tensor, bits: int, group_size: int, symmetric: bool) -> Tensor:  # w: [N, C]
        ctx.save_for_backward(w)
        ctx.options = bits, group_size, symmetric
        return fake_quantize_forward(w, bits, group_size, symmetric)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (w,) = ctx.saved_tensors
        return fake_quantize_backward(w, grad, *ctx.options), None, None, None


def compensate(
    todo: Tensor, factor: Tensor, scale: Tensor, lowest: Tensor, span: float, floating: bool = False
) -> tuple[Tensor, Tensor]:
    """Do the same as `core.rounding.compensate` by a kernel, but leave `todo` unchanged.

    Raises `KernelError` for tensors that are not float32.
    """
    from .triton_loops import compensate_kernel

    _check_float32(todo=todo, factor=factor, scale=scale, lowest=lowest)
    todo, scale, lowest = todo.contiguous(), scale.contiguous(), lowest.contiguous()
    factor = _unit_columns(factor)
    (columns, rows), tile = todo.shape, _tile(todo)
    steps, errors = torch.empty_like(todo), torch.empty_like(todo)
    with current(todo.device):
        compensate_kernel[(_cdiv(rows, tile),)](
            todo,
            factor,
            scale,
            lowest,
            steps,
            errors,
            float(span),
            columns,
            rows,
            factor.stride(0),
            B=_next_power_of_two(columns),
            ROWS=tile,
            FLOATING=floating,
            num_warps=1,
        )
    return steps, errors


def descend(
    k: Tensor,
    m: Tensor,
    local: Tensor,
    curvature: Tensor,
    scale: Tensor,
    lowest: Tensor,
    highest: Tensor,
    floating: bool = False,
) -> None:
    """Do the same as `core.rounding.descend` by a kernel.

    Raises `KernelError` for tensors that are not float32, and for an m whose last dimension does not have stride 1.
    """
    from .triton_loops import descend_kernel

    _check_float32(k=k, m=m, local=local, curvature=curvature, scale=scale, lowest=lowest, highest=highest)
    if m.stride(1) != 1:
        raise KernelError(f"m has strides {m.stride()}, the last must be 1; pass m.contiguous()")
    local = _unit_columns(local)
    (columns, rows), tile = k.shape, _tile(k)
    with current(k.device):
        descend_kernel[(_cdiv(rows, tile),)](
            k,
            m,
            local,
            curvature.contiguous(),
            scale.contiguous(),
            lowest.contiguous(),
            highest.contiguous(),
            columns,
            rows,
            *k.stride(),
            m.stride(0),
            local.stride(0),
            G=_next_power_of_two(columns),
            ROWS=tile,
            FLOATING=floating,
            num_warps=1,
        )


def fake_quantize_forward(w: Tensor, bits: int, group_size: int, symmetric: bool) -> Tensor:
    """Compute ŵ from w by a kernel; both float32 [N, C]. Raises `KernelError` for another dtype or group size."""
    from .triton_loops import fake_quantize_kernel

    w = w.contiguous()
    out = torch.empty_like(w)
    _by_groups(fake_quantize_kernel, (w, out), bits, group_size, symmetric)
    return out


def fake_quantize_backward(w: Tensor, grad: Tensor, bits: int, group_size: int, symmetric: bool) -> Tensor:
    """Compute the gradient of w from `grad`, the gradient of ŵ, by a kernel; all float32 [N, C]."""
    from .triton_loops import fake_quantize_backward_kernel

    w, grad = w.contiguous(), grad.contiguous()
    out = torch.empty_like(w)
    _by_groups(fake_quantize_backward_kernel, (w, grad, out), bits, group_size, symmetric)
    return out


def _by_groups(kernel, tensors: tuple[Tensor, ...], bits: int, group_size: int, symmetric: bool) -> None:
    """Start a kernel on contiguous float32 tensors [N, C], which it reads as [N · G, g]: each group is a row."""
    w = tensors[0]
    _check_float32(**{f"tensor {i}": t for i, t in enumerate(tensors)})
    if group_size not in (32, 64, 128) or w.shape[-1] % group_size:
        raise KernelError(f"group size is {group_size}, allowed: 32, 64, 128, if it divides the {w.shape[-1]} channels")
    groups = w.numel() // group_size
    tile = TILE // group_size
    with current(w.device):
        kernel[(_cdiv(groups, tile),)](
            *tensors,
            groups,
            G=group_size,
            TILE=tile,
            TOP=2**bits - 1,
            SYMMETRIC=symmetric,
            MIN_SCALE=MIN_SCALE,
            num_warps=4,
        )


def _by_triton(device: torch.device) -> bool:
    return device.type == "cuda" and not triton_missing()


def _check_float32(**tensors: Tensor) -> None:
    """Check that all tensors are float32, because the kernels round by a trick that only works with its precision."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise KernelError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, allowed: float32")


def _unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _tile(columns: Tensor) -> int:
    """Return the rows per program for columns [B, N]: many on a CPU, because the interpreter is slow for each program."""
    return ROWS if columns.is_cuda else min(_next_power_of_two(columns.shape[1]), 128)


def _next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
