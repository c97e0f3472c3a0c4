"""The operators `pairquant::rotate` and `pairquant::rotated_linear`: opaque to torch.compile, safe in CUDA graphs.

Each checks its inputs, then runs the implementation for their device: Triton on NVIDIA GPUs, `cpu` on CPUs. And those
that make what a layer keeps from what is stored, so that a graph in which that happens does not show how: traced, the
making took ten times as long to compile as the model.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ...core.linear import decode
from ...spec.linear import LinearLayout, PackedLinear
from ...support.errors import KernelError
from . import cpu, table
from .weights import KernelWeights, RotationWeights

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
#: `CpuWeights` has this many tensors, `KernelWeights` more.
CPU_TENSORS = 3


@lru_cache
def triton_missing() -> str | None:
    """Why the Triton kernels cannot be used, in words; None if they can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install it with `pip install triton`"
    return None


def device_class(device: torch.device) -> str:
    """ "sm90" for an H100: what `table` is keyed by. "interpreter" where kernels run as Python, in tests."""
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def rotate(x: Tensor, theta: Tensor, pairs: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """(x · scales) R for T transforms of the same input: x [..., C], theta [T, K, C/2] (radians), pairs [T, K, C]
    (group-local), scales [T, C], the 1/a of the method → [T, ..., C] in x's dtype.

    Differentiable in x, theta and scales, from the saved output (no copies per rotation). x: float16, bfloat16,
    float32; any strides. Raises `KernelError` for shapes, dtypes or devices that do not fit.
    """
    if theta.dim() != 3 or pairs.dim() != 3 or pairs.shape[-1] != 2 * theta.shape[-1]:
        raise KernelError(
            f"theta has shape {list(theta.shape)} and pairs {list(pairs.shape)}; needed are [T, K, C/2] and [T, K, C]"
        )
    if group_size not in (32, 64, 128) or pairs.shape[-1] % group_size:
        raise KernelError(f"group size is {group_size}, allowed: 32, 64, 128, dividing the {pairs.shape[-1]} channels")
    rotation = RotationWeights.build(theta, pairs, scales, group_size)
    return torch.ops.pairquant.rotate(x, rotation.coefficients, rotation.partners, rotation.scales)


@torch.library.custom_op("pairquant::rotate", mutates_args=())
def rotate_op(x: Tensor, coefficients: Tensor, partners: Tensor, scales: Tensor) -> Tensor:
    """x [..., C] → [T, ..., C] (the other tensors: see `RotationWeights`)."""
    rotation = RotationWeights(coefficients, partners, scales, group_size=128)
    rows = _rows(x, rotation.channels, scales.device)
    if rows.shape[0] == 0:
        return x.new_empty(rotation.transforms, *x.shape)
    out = _givens()(rows, rotation) if x.is_cuda else _rotate_plain(rows, rotation)
    return out.view(rotation.transforms, *x.shape)


@rotate_op.register_fake
def _(x, coefficients, partners, scales):
    return x.new_empty(coefficients.shape[0], *x.shape)


@torch.library.custom_op("pairquant::rotate_backward", mutates_args=())
def rotate_backward_op(
    y: Tensor, grad: Tensor, coefficients: Tensor, partners: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [M, C], coefficients and scales in float32, for y and grad [T, M, C]."""
    rotation = RotationWeights(coefficients, partners, scales, group_size=128)
    if y.is_cuda:
        from .launch import rotate_backward

        return rotate_backward(y.contiguous(), grad.contiguous(), rotation)
    return _rotate_backward_plain(y, grad, rotation)


@rotate_backward_op.register_fake
def _(y, grad, coefficients, partners, scales):
    return (
        y.new_empty(y.shape[1:], dtype=torch.float32),
        torch.empty_like(coefficients),
        torch.empty_like(scales, dtype=torch.float32),
    )


def _save_for_rotate(ctx, inputs, output):
    _, coefficients, partners, scales = inputs
    ctx.save_for_backward(output, coefficients, partners, scales)


def _backward_of_rotate(ctx, grad):
    y, coefficients, partners, scales = ctx.saved_tensors
    shape = y.shape[1:]
    y, grad = y.reshape(y.shape[0], -1, shape[-1]), grad.reshape(y.shape[0], -1, shape[-1])
    grad_x, grad_coefficients, grad_scales = torch.ops.pairquant.rotate_backward(
        y, grad, coefficients, partners, scales
    )
    return grad_x.view(shape).to(y.dtype), grad_coefficients, None, grad_scales.to(scales.dtype)


rotate_op.register_autograd(_backward_of_rotate, setup_context=_save_for_rotate)


@torch.library.custom_op("pairquant::rotated_linear", mutates_args=())
def rotated_linear(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, out_features: list[int], group_size: int
) -> Tensor:
    """x [..., C] → [..., sum of out_features] in x's dtype: the linears of `weight`, side by side.

    weight: `KernelWeights.tensors()` on a GPU (x float16, bfloat16 or float32), `CpuWeights.tensors()` on a CPU (x
    bfloat16). bias: [sum of out_features] or None. Differentiable in x (the weight is frozen).
    """
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], sum(out_features))
    if len(weight) > CPU_TENSORS:
        weights = KernelWeights.of_tensors(weight, out_features, group_size)
        rows = _rows(x, weights.rotation.channels, weights.words.device)
        y = _linear_by_triton(rows, weights, bias if bias is None else bias.to(x.dtype))
    else:
        channels = weight[-1].shape[0] * group_size
        rows = _rows(x, channels, weight[0].device, dtypes=(torch.bfloat16,))
        y = cpu.rotated_linear(rows, weight, bias if bias is None else bias.to(x.dtype), group_size)
    return y.view(*x.shape[:-1], sum(out_features))


@rotated_linear.register_fake
def _(x, weight, bias, out_features, group_size):
    return x.new_empty(*x.shape[:-1], sum(out_features))


@torch.library.custom_op("pairquant::rotated_linear_backward", mutates_args=())
def rotated_linear_backward(grad: Tensor, weight: list[Tensor], out_features: list[int], group_size: int) -> Tensor:
    """grad [..., N] → grad · Ŵ, [..., C]."""
    if len(weight) > CPU_TENSORS:
        from .launch import decode

        dense = decode(KernelWeights.of_tensors(weight, out_features, group_size), grad.dtype)
    else:
        packed, grid, matrix = weight
        channels = matrix.shape[0] * group_size
        # The packed form is opaque: the product with the identity gives the rotated weight back.
        eye = torch.eye(channels, dtype=torch.bfloat16)
        rotated = torch.ops.aten._weight_int4pack_mm_for_cpu(eye, packed, group_size, grid).T.float()
        dense = cpu.rotate_dense(rotated, matrix.mT).to(grad.dtype)
    return (grad.reshape(-1, grad.shape[-1]) @ dense).view(*grad.shape[:-1], dense.shape[1])


@rotated_linear_backward.register_fake
def _(grad, weight, out_features, group_size):
    channels = weight[5].shape[-1] if len(weight) > CPU_TENSORS else weight[2].shape[0] * group_size
    return grad.new_empty(*grad.shape[:-1], channels)


def _save_for_linear(ctx, inputs, output):
    _, weight, bias, out_features, group_size = inputs
    ctx.save_for_backward(*weight)
    ctx.sizes, ctx.group_size, ctx.has_bias = out_features, group_size, bias is not None


def _backward_of_linear(ctx, grad):
    grad_x = torch.ops.pairquant.rotated_linear_backward(grad, list(ctx.saved_tensors), ctx.sizes, ctx.group_size)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
    return grad_x, [None] * len(ctx.saved_tensors), grad_bias, None, None


rotated_linear.register_autograd(_backward_of_linear, setup_context=_save_for_linear)


@torch.library.custom_op("pairquant::decode", mutates_args=())
def decode_op(stored: list[Tensor], bits: int, group_size: int) -> Tensor:
    """The dense weight, float32 [N, C]. stored: the first six tensors of a `PackedLinear`, in their order."""
    return decode(_packed(stored, bits, group_size))


@decode_op.register_fake
def _(stored, bits, group_size):
    qweight, _, scales = stored[:3]
    return scales.new_empty(scales.shape[1], qweight.shape[0], dtype=torch.float32)


@torch.library.custom_op("pairquant::cpu_weights", mutates_args=())
def cpu_weights(stored: list[Tensor], group_size: int) -> list[Tensor]:
    """`CpuWeights.tensors()` of a 4-bit linear (stored: see `decode_op`)."""
    return cpu.CpuWeights.build(_packed(stored, 4, group_size)).tensors()


@cpu_weights.register_fake
def _(stored, group_size):
    (channels, _), (groups, rows) = stored[0].shape, stored[2].shape
    return [
        stored[0].new_empty(rows, channels // 2, dtype=torch.uint8),
        stored[0].new_empty(groups, rows, 2, dtype=torch.bfloat16),
        stored[0].new_empty(groups, group_size, group_size, dtype=torch.float32),
    ]


def _packed(stored: list[Tensor], bits: int, group_size: int) -> PackedLinear:
    qweight, _, scales, theta, *_ = stored
    return PackedLinear(LinearLayout(qweight.shape[0], scales.shape[1], bits, group_size, theta.shape[0]), *stored)


def _rows(x: Tensor, channels: int, device: torch.device, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensor:
    """x as [M, C] with unit stride in the last dimension, checked."""
    if x.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise KernelError(f"x is {str(x.dtype).removeprefix('torch.')}, allowed on {x.device.type}: {allowed}")
    if x.dim() < 1 or x.shape[-1] != channels:
        raise KernelError(f"x has shape {list(x.shape)}, its last dimension must be {channels}")
    if x.device != device:
        raise KernelError(f"x is on {x.device}, the weights are on {device}. Move one of them.")
    rows = x.reshape(math.prod(x.shape[:-1]), channels)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _givens():
    if reason := triton_missing():
        raise KernelError(f"rotating on a GPU needs Triton. {reason}.")
    from .launch import rotate

    return rotate


def _linear_by_triton(x: Tensor, weights: KernelWeights, bias: Tensor | None) -> Tensor:
    from .launch import linear

    choice: table.Choice = table.DENSE
    if x.dtype != torch.float32:  # the products are for 16 bits; float32 is decoded and multiplied exactly
        choice = table.choose(device_class(x.device), sum(weights.out_features), x.shape[1], x.shape[0])
    return linear(x, weights, bias, choice)


def _rotate_plain(x: Tensor, rotation: RotationWeights) -> Tensor:
    """K gathers per transform, for devices without a kernel; x [M, C] → [T, M, C]."""
    padded = torch.nn.functional.pad(x.float()[None] * rotation.scales.float()[:, None], (0, -x.shape[1] % 128))
    y = padded.view(*padded.shape[:2], -1, 128)
    for k in range(rotation.rotations):
        cos, sin, partner = _step(rotation, k, y)
        y = cos * y + sin * y.gather(-1, partner)
    return y.reshape(padded.shape)[..., : x.shape[1]].to(x.dtype).contiguous()


def _rotate_backward_plain(y: Tensor, grad: Tensor, rotation: RotationWeights) -> tuple[Tensor, Tensor, Tensor]:
    """The same from behind: each rotation's input is recovered from its output."""
    channels, padding = y.shape[-1], -y.shape[-1] % 128
    y, grad = (torch.nn.functional.pad(t.float(), (0, padding)).view(*t.shape[:2], -1, 128) for t in (y, grad))
    slopes = torch.zeros_like(rotation.coefficients)
    for k in reversed(range(rotation.rotations)):
        cos, sin, partner = _step(rotation, k, y)
        y = cos * y - sin * y.gather(-1, partner)
        slopes[:, :, k, 0] = (grad * y).sum(1)
        slopes[:, :, k, 1] = (grad * y.gather(-1, partner)).sum(1)
        grad = cos * grad - sin * grad.gather(-1, partner)
    y, grad = y.flatten(-2)[..., :channels], grad.flatten(-2)[..., :channels]
    scales = rotation.scales.float()
    return (grad * scales[:, None]).sum(0), slopes, (grad * y).sum(1) / scales


def _step(rotation: RotationWeights, k: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines, signed sines and partners of rotation k, [T, 1, KB, 128]; partners expanded to the shape of `like`."""
    cos, sin = rotation.coefficients[:, None, :, k, 0], rotation.coefficients[:, None, :, k, 1]
    return cos, sin, rotation.partners[:, None, :, k].long().expand_as(like)
