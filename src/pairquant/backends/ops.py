"""Run prepared linears by the operator `pairquant::rotated_linear`. torch.compile does not look inside it, and it can be
used in CUDA graphs.

The operator checks its input, then calls the backend whose name it is given. `dense` and `cpu_int4` also have operators
that prepare weights: when torch.compile traced the preparation, compiling it took ten times as long as compiling the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec.fields import short
from ..support.errors import KernelError
from .base import Backend
from .operators import fake, operator
from .table import BY_NAME


def run(
    backend: Backend,
    x: Tensor,
    tensors: list[Tensor],
    bias: Tensor | None,
    sizes: Sequence[int],
    group_size: int,
    activations: str | None = None,
) -> Tensor:
    """Run linears that read the same input by this backend: x [..., C] → [..., sum of sizes] in x's dtype.

    tensors: what the backend prepared; bias: [sum of sizes] or None; sizes: out_features of each linear; activations: the
    format that the rotated x is rounded to, None for none. Raises `KernelError` if the backend is opaque and cannot take
    x's dtype, shape or device.
    """
    if backend.opaque and _needs_operator(x, bias):
        return torch.ops.pairquant.rotated_linear(x, tensors, bias, list(sizes), group_size, backend.name, activations)
    if backend.opaque:
        return _compute(x, tensors, bias, sizes, group_size, backend, activations)
    return backend.compute(x, tensors, bias if bias is None else bias.to(x.dtype), sizes, group_size, activations)


def _save_for_backward(ctx, inputs, output):
    x, tensors, bias, sizes, group_size, backend, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.options, ctx.has_bias = (sizes, group_size, backend, x.shape[-1]), bias is not None


def _backward(ctx, grad):
    grad_x = torch.ops.pairquant.rotated_linear_backward(grad, list(ctx.saved_tensors), *ctx.options)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
    return grad_x, [None] * len(ctx.saved_tensors), grad_bias, None, None, None, None


@operator("rotated_linear", _backward, _save_for_backward)
def rotated_linear(
    x: Tensor,
    tensors: list[Tensor],
    bias: Tensor | None,
    sizes: list[int],
    group_size: int,
    backend: str,
    activations: str | None,
) -> Tensor:
    """Run linears that read the same input: x [..., C] → [..., sum of sizes] in x's dtype (for the arguments see `run`).

    Differentiable in x and bias; the weight is frozen, and rounding of activations passes gradients unchanged. Raises
    `KernelError` if x has a dtype that the backend does not accept, a last dimension other than C, or another device than the weights.
    """
    return _compute(x, tensors, bias, sizes, group_size, BY_NAME[backend], activations)


@fake("rotated_linear")
def _(x, tensors, bias, sizes, group_size, backend, activations):
    return x.new_empty(*x.shape[:-1], sum(sizes))


@operator("rotated_linear_backward")
def rotated_linear_backward(
    grad: Tensor, tensors: list[Tensor], sizes: list[int], group_size: int, backend: str, channels: int
) -> Tensor:
    """Compute the gradient of x, grad · Ŵ [..., channels], from that of the output, grad [..., N]."""
    rows = grad.reshape(-1, grad.shape[-1])
    return BY_NAME[backend].input_gradient(rows, tensors, sizes, group_size).view(*grad.shape[:-1], channels)


@fake("rotated_linear_backward")
def _(grad, tensors, sizes, group_size, backend, channels):
    return grad.new_empty(*grad.shape[:-1], channels)


def _needs_operator(x: Tensor, bias: Tensor | None) -> bool:
    """Tell whether something must see the operator: a compiler or tracer, autograd, or a subclass of tensors.

    Calling it takes 15 to 25 us on one core of an EPYC 9005, half as long as a product of 576 x 576 with one token.
    """
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def _compute(
    x: Tensor,
    tensors: Sequence[Tensor],
    bias: Tensor | None,
    sizes: Sequence[int],
    group_size: int,
    runner: Backend,
    activations: str | None,
) -> Tensor:
    """Do what `rotated_linear` says."""
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], sum(sizes))
    rows = rows_of(x, runner.channels(tensors, group_size), tensors[0].device, runner.dtypes)
    y = runner.compute(rows, tensors, bias if bias is None else bias.to(x.dtype), sizes, group_size, activations)
    return y.view(*x.shape[:-1], sum(sizes))


def rows_of(x: Tensor, channels: int, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """Check x and return it as [M, C] with stride 1 in the last dimension; raises `KernelError`."""
    if x.dtype not in dtypes:
        raise KernelError(f"x is {short(x.dtype)}, allowed on {x.device.type}: {', '.join(map(short, dtypes))}")
    if x.dim() < 1 or x.shape[-1] != channels:
        raise KernelError(f"x has shape {list(x.shape)}, its last dimension must be {channels}")
    if x.device != device:
        raise KernelError(f"x is on {x.device}, the weights are on {device}. Move one of them.")
    rows = x.reshape(math.prod(x.shape[:-1]), channels)
    return rows if rows.stride(-1) == 1 else rows.contiguous()
