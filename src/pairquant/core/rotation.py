"""Pairwise rotations: apply them step by step, undo them, and multiply them out to one dense matrix per group.

A Givens rotation on channels (i, j) with angle t:  y_i = cos t · x_i + sin t · x_j,  y_j = cos t · x_j - sin t · x_i.
A step consists of rotations whose pairs share no channel. The K steps, in order, multiply row vectors from the right by
R = P_1 P_2 … P_K, which is orthogonal and has one block per group (paper, section 3).

In all functions: theta floating [K, C/2], in radians; pairs integer [K, C], channels counted from 0 within their group
(see `spec.rotation`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, theta: Tensor, pairs: Tensor, group_size: int) -> Tensor:
    """Compute x R for x [..., C], one rotation after the other, in x's dtype. Differentiable."""
    return _apply_steps(x, theta, pairs, group_size, range(theta.shape[0]), sign=1.0)


def unrotate(x: Tensor, theta: Tensor, pairs: Tensor, group_size: int) -> Tensor:
    """Compute x Rᵀ for x [..., C], which undoes `rotate`: rotate in reverse order by the negated angles."""
    return _apply_steps(x, theta, pairs, group_size, reversed(range(theta.shape[0])), sign=-1.0)


def rotation_matrix(theta: Tensor, pairs: Tensor, group_size: int, positions: Tensor | None = None) -> Tensor:
    """Compute the dense R of every group: [G, g, g] in theta's dtype, differentiable in theta.

    positions: `givens_positions(pairs, group_size)`, for callers that compute R for the same pairs many times. The K
    factors are multiplied in pairs, then the products in pairs, and so on, so that autograd sees log2(K) batched products.
    """
    rotations, half = theta.shape
    num_groups = 2 * half // group_size
    if rotations == 0:
        return torch.eye(group_size, dtype=theta.dtype, device=theta.device).expand(num_groups, -1, -1)
    if positions is None:
        positions = givens_positions(pairs, group_size)
    cos, sin = theta.cos().flatten(), theta.sin().flatten()
    entries = torch.stack((cos, cos, sin, -sin))
    factors = torch.zeros(rotations * num_groups * group_size**2, dtype=theta.dtype, device=theta.device)
    factors = factors.index_put((positions,), entries).view(rotations, num_groups, group_size, group_size)
    while len(factors) > 1:
        even = len(factors) // 2 * 2
        factors = torch.cat((factors[0:even:2] @ factors[1:even:2], factors[even:]))
    return factors[0]


def givens_positions(pairs: Tensor, group_size: int) -> Tensor:
    """Return where the entries [i, i], [j, j], [j, i], [i, j] of each pair are in the flattened factors: int64 [4, K · C/2]."""
    rotations, channels = pairs.shape
    i, j = pairs.long().reshape(-1, 2).unbind(-1)
    block = torch.arange(rotations * channels // group_size, device=pairs.device)
    base = block.repeat_interleave(group_size // 2) * group_size**2
    return torch.stack((i * group_size + i, j * group_size + j, j * group_size + i, i * group_size + j)) + base


def rotate_dense(x: Tensor, matrix: Tensor) -> Tensor:
    """Compute x R for x [..., C] with the dense matrix [G, g, g]; pass `matrix.mT` to undo it."""
    num_groups, g, _ = matrix.shape
    by_group = x.reshape(-1, num_groups, g).transpose(0, 1)
    return (by_group @ matrix).transpose(0, 1).reshape(x.shape)


def channel_form(theta: Tensor, pairs: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Rewrite each rotation as y_c = cos_c · x_c + s_c · x_p(c) for every channel c, where p(c) is its partner.

    Returns coefficients [K, 2, C], in theta's dtype and differentiable: cos_c, and the signed sine s_c, which is +sin for
    the first channel of a pair and -sin for the second. Also returns the partners, uint8 [K, C], counted from 0 within
    their group.
    """
    rotations, channels = pairs.shape
    local = pairs.long().view(rotations, channels // 2, 2)
    start = torch.arange(0, channels, group_size, device=pairs.device).repeat_interleave(group_size // 2)
    where = (local + start[:, None]).flatten(1)  # [K, C]: i, j, i, j, …
    cos, sin = theta.cos(), theta.sin()
    coefficients = torch.stack(
        [
            torch.zeros_like(cos).repeat(1, 2).scatter(1, where, values.flatten(1))
            for values in (torch.stack((cos, cos), dim=-1), torch.stack((sin, -sin), dim=-1))
        ],
        dim=1,
    )
    partners = torch.zeros_like(where).scatter(1, where, local.flip(-1).flatten(1)).to(torch.uint8)
    return coefficients, partners


def _apply_steps(x: Tensor, theta: Tensor, pairs: Tensor, group_size: int, steps, sign: float) -> Tensor:
    channels = x.shape[-1]
    start = torch.arange(0, channels, group_size, device=x.device).repeat_interleave(group_size // 2)
    for k in steps:
        i, j = pairs[k].long().view(-1, 2).unbind(-1)
        i, j = i + start, j + start
        cos, sin = theta[k].cos().to(x.dtype), (sign * theta[k].sin()).to(x.dtype)
        x_i, x_j = x[..., i], x[..., j]
        where = torch.cat((i, j)).argsort()
        x = torch.cat((cos * x_i + sin * x_j, cos * x_j - sin * x_i), dim=-1)[..., where]
    return x
