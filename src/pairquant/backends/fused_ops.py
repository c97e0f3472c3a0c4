"""Run prepared linears together with what comes before them, by the operators `pairquant::norm_linear` and `silu_linear`.

As for `pairquant::rotated_linear`, the number of tokens decides within the operator which kernels run, so a graph that
torch.compile made for any number of tokens holds one operator. They pass no gradients: they are for engines that only
generate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.run.norm import Norm
from ..spec.fields import short
from ..support.errors import KernelError
from .operators import fake, operator
from .ops import rows_of
from .table import BY_NAME


@operator("norm_linear")
def norm_linear(
    x: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    tensors: list[Tensor],
    bias: Tensor | None,
    sizes: list[int],
    group_size: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Run linears on the RMSNorm of h = x + residual; return their output [..., sum of sizes], and h [..., C], in x's dtype.

    x, residual: [..., C] of one dtype; norm: [C], its weight; the other arguments are those of `ops.run`. Raises `KernelError`
    if x has a dtype that the backend does not accept, a last dimension other than C, or another device than the weights, and
    if residual or norm does not fit x.
    """
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], sum(sizes)), torch.empty_like(x)
    runner, device = BY_NAME[backend], tensors[0].device
    channels = runner.channels(tensors, group_size)
    rows = rows_of(x, channels, device, runner.dtypes)
    _require_fit(x, residual, norm)
    added = rows_of(residual, channels, device, runner.dtypes)
    bias = bias if bias is None else bias.to(x.dtype)
    y, h = runner.compute_after_norm(rows, added, Norm(norm, eps), tensors, bias, sizes, group_size)
    return y.view(*x.shape[:-1], sum(sizes)), h.view(x.shape)


def _require_fit(x: Tensor, residual: Tensor, norm: Tensor) -> None:
    """Raise `KernelError` if the residual is not like x [..., C], or the weight of the norm not [C] on the same device."""
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        raise KernelError(f"the residual is {_described(residual)}, it must be as x, {_described(x)}")
    if norm.shape != x.shape[-1:] or norm.device != x.device:
        raise KernelError(
            f"the norm's weight is {_described(norm)}, for x, {_described(x)}, it must have shape {list(x.shape[-1:])} on {x.device}"
        )


def _described(tensor: Tensor) -> str:
    return f"{short(tensor.dtype)} {list(tensor.shape)} on {tensor.device}"


@fake("norm_linear")
def _(x, residual, norm, eps, tensors, bias, sizes, group_size, backend):
    return x.new_empty(*x.shape[:-1], sum(sizes)), x.new_empty(x.shape)


@operator("silu_linear")
def silu_linear(
    x: Tensor, tensors: list[Tensor], bias: Tensor | None, sizes: list[int], group_size: int, backend: str
) -> Tensor:
    """Run linears on silu(gate) · up, where x [..., 2 C] is gate and up side by side: [..., sum of sizes] in x's dtype.

    The other arguments, and what is raised, are those of `ops.run`.
    """
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], sum(sizes))
    runner = BY_NAME[backend]
    rows = rows_of(x, 2 * runner.channels(tensors, group_size), tensors[0].device, runner.dtypes)
    y = runner.compute_after_silu(rows, tensors, bias if bias is None else bias.to(x.dtype), sizes, group_size)
    return y.view(*x.shape[:-1], sum(sizes))


@fake("silu_linear")
def _(x, tensors, bias, sizes, group_size, backend):
    return x.new_empty(*x.shape[:-1], sum(sizes))
