"""The dense R of every group from its angles, again and again for the same pairs: by Triton's kernels where angles are
float32 on a GPU, by `core.rotation` elsewhere.

On an H100 the factors of an 8B block and their products, which PyTorch writes to memory, took a sixth of the fitting.
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
    """`core.rotation.rotation_matrix` of fixed pairs: call it with theta, [K, C/2] → [G, g, g], differentiable."""

    def __init__(self, pairs: Tensor, group_size: int):
        """pairs: integer [K, C], group-local."""
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
    """The pairs as kernels read them, by channel: partner, the channel it is mixed with, group-local, and slot, which of
    the C/2 angles, s for a pair's first channel and -1 - s for its second; int32 [K, C].

    channel: of each pair in order its two, int64 [K, C].
    """

    partner: Tensor
    slot: Tensor
    channel: Tensor
    group_size: int

    @classmethod
    def build(cls, pairs: Tensor, group_size: int) -> Plan:
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
    """theta float32 [K, C/2] → R [C/g, g, g]."""

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
    """Build R of every group by the kernel, on the device of theta."""
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
    """Return the gradient of theta for that of the matrices, in the same order of sums every time."""
    from .triton_matrices import matrix_backward_kernel

    theta, grad, g = theta.contiguous(), grad.contiguous(), plan.group_size
    rotations, channels = plan.partner.shape
    slopes = torch.empty(g // ROWS, rotations, channels, device=theta.device)
    with current(theta.device):
        matrix_backward_kernel[(channels // g, g // ROWS)](
            theta, plan.partner, plan.slot, matrices, grad, slopes, channels, rotations, ROWS=ROWS, G=g
        )
    return slopes.sum(0).gather(1, plan.channel).view(rotations, -1, 2).sum(-1)
