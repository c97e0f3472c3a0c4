"""Compute the dense R of every group from its angles, many times for the same pairs. Triton kernels do it if the angles
are float32 on a GPU, `core.rotation` in all other cases.

PyTorch writes the factors of R and their products to memory. For an 8B model on an H100, this took a sixth of the fitting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.rotation import givens_positions, rotation_matrix
from ...support.devices import current
from ...support.errors import KernelError
from ..availability import triton_missing

#: Rows of a group's matrix per program.
ROWS = 32


class Matrices:
    """`core.rotation.rotation_matrix` for fixed pairs. Call it with theta [K, C/2] to get R [G, g, g], differentiable."""

    def __init__(self, pairs: Tensor, group_size: int):
        """Prepare for these pairs, integer [K, C], which count channels from 0 within their group.

        Raises `KernelError` on a GPU if the group size is not 32, 64 or 128.
        """
        self.pairs, self.group_size = pairs, group_size
        by_triton = pairs.is_cuda and pairs.numel() and not triton_missing()
        self.plan = Plan.build(pairs, group_size) if by_triton else None
        self.positions = None if by_triton else givens_positions(pairs, group_size)

    def __call__(self, theta: Tensor) -> Tensor:
        if self.plan is not None and theta.dtype == torch.float32:
            return BuildMatrices.apply(theta, self.plan)
        return rotation_matrix(theta, self.pairs, self.group_size, self.positions)


@dataclass(frozen=True)
class Plan:
    """The pairs, arranged by channel as the kernels read them.

    partner: the channel that each channel is mixed with, counted from 0 within its group, int32 [K, C].
    slot: which of the C/2 angles belongs to the channel, int32 [K, C]: s for the first channel of a pair, -1 - s for the
    second.
    channel: the two channels of each pair, pair after pair, counted from 0 within all C, int64 [K, C].
    """

    partner: Tensor
    slot: Tensor
    channel: Tensor
    group_size: int

    @classmethod
    def build(cls, pairs: Tensor, group_size: int) -> Plan:
        """Arrange pairs, integer [K, C], by channel. Raises `KernelError` if the group size is not 32, 64 or 128."""
        rotations, channels = pairs.shape
        if group_size not in (32, 64, 128):
            raise KernelError(f"group size is {group_size}, allowed: 32, 64, 128")
        local = pairs.long().view(rotations, -1, 2)
        slot = torch.arange(channels // 2, device=pairs.device)
        start = slot * 2 // group_size * group_size
        channel = (local + start[:, None]).flatten(1)
        signed = torch.stack((slot, -1 - slot), dim=-1).flatten().expand_as(channel)
        partner = torch.zeros_like(channel).scatter(1, channel, local.flip(-1).flatten(1))
        return cls(partner.int(), torch.zeros_like(channel).scatter(1, channel, signed).int(), channel, group_size)


class BuildMatrices(torch.autograd.Function):
    """The differentiable function from theta, float32 [K, C/2], to R, float32 [G, g, g], by the kernels."""

    @staticmethod
    def forward(ctx, theta: Tensor, plan: Plan) -> Tensor:
        matrices = build(theta, plan)
        ctx.save_for_backward(theta, matrices)
        ctx.plan = plan
        return matrices

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        theta, matrices = ctx.saved_tensors
        return build_backward(theta, matrices, grad, ctx.plan), None


def build(theta: Tensor, plan: Plan) -> Tensor:
    """Compute R of every group, float32 [G, g, g], by the kernel on theta's device."""
    from .triton_matrices import matrix_kernel

    theta, g = theta.contiguous(), plan.group_size
    rotations, channels = plan.partner.shape
    matrices = torch.empty(channels // g, g, g, device=theta.device)
    with current(theta.device):
        matrix_kernel[(channels // g, g // ROWS)](
            theta, plan.partner, plan.slot, matrices, channels, rotations, ROWS=ROWS, G=g
        )
    return matrices


def build_backward(theta: Tensor, matrices: Tensor, grad: Tensor, plan: Plan) -> Tensor:
    """Compute the gradient of theta from `grad`, the gradient of the matrices.

    The order of the sums is always the same, so that the result is too.
    """
    from .triton_matrices import matrix_backward_kernel

    theta, grad, g = theta.contiguous(), grad.contiguous(), plan.group_size
    rotations, channels = plan.partner.shape
    slopes = torch.empty(g // ROWS, rotations, channels, device=theta.device)
    with current(theta.device):
        matrix_backward_kernel[(channels // g, g // ROWS)](
            theta, plan.partner, plan.slot, matrices, grad, slopes, channels, rotations, ROWS=ROWS, G=g
        )
    return slopes.sum(0).gather(1, plan.channel).view(rotations, -1, 2).sum(-1)
