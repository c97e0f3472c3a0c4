"""The dense R of every group and the gradient of its angles.

One program has some rows of one group's matrix in registers and takes them through all K rotations: a channel is mixed
with its partner, which a gather along the row brings. The gradient walks back, undoing rotations instead of having
kept what was between them: they are orthogonal.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotation(theta_ptr, partner_ptr, slot_ptr, k, channels, channel, ROWS: tl.constexpr, G: tl.constexpr):
    """Rotation k of G channels: partners [ROWS, G], cosines and signed sines [1, G], signs [G]."""
    at = k * channels + channel
    partner = tl.load(partner_ptr + at)
    slot = tl.load(slot_ptr + at)
    sign = tl.where(slot < 0, -1.0, 1.0)
    slot = tl.where(slot < 0, -slot - 1, slot)  # of a pair's second channel the complement is stored
    theta = tl.load(theta_ptr + k * (channels // 2) + slot)
    partners = tl.broadcast_to(partner[None, :], (ROWS, G))
    return partners, tl.cos(theta)[None, :], (sign * tl.sin(theta))[None, :], sign


@triton.jit(do_not_specialize=["channels", "rotations"])
def matrix_kernel(
    theta_ptr,  # float32 [K, C/2]
    partner_ptr,  # int32 [K, C]
    slot_ptr,  # int32 [K, C]
    matrix_ptr,  # float32 [C/g, g, g], written
    channels,  # C
    rotations,  # K
    ROWS: tl.constexpr,
    G: tl.constexpr,
):
    group = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, G)
    x = tl.where(row[:, None] == column[None, :], 1.0, 0.0)
    for k in range(rotations):
        partners, cos, sin, _ = rotation(theta_ptr, partner_ptr, slot_ptr, k, channels, group * G + column, ROWS, G)
        x = cos * x + sin * tl.gather(x, partners, axis=1)
    tl.store(matrix_ptr + (group * G + row[:, None]).to(tl.int64) * G + column[None, :], x)


@triton.jit(do_not_specialize=["channels", "rotations"])
def matrix_backward_kernel(
    theta_ptr,  # float32 [K, C/2]
    partner_ptr,  # int32 [K, C]
    slot_ptr,  # int32 [K, C]
    matrix_ptr,  # float32 [C/g, g, g]
    grad_ptr,  # float32 [C/g, g, g], the matrices' gradient
    slope_ptr,  # float32 [g/ROWS, K, C], written: each channel's part of its angle's gradient, of these rows
    channels,
    rotations,
    ROWS: tl.constexpr,
    G: tl.constexpr,
):
    group, part = tl.program_id(0), tl.program_id(1)
    row = part * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, G)
    at = (group * G + row[:, None]).to(tl.int64) * G + column[None, :]
    x, grad = tl.load(matrix_ptr + at), tl.load(grad_ptr + at)
    for back in range(rotations):
        k = rotations - 1 - back
        partners, cos, sin, sign = rotation(theta_ptr, partner_ptr, slot_ptr, k, channels, group * G + column, ROWS, G)
        x_partner = tl.gather(x, partners, axis=1)
        slope = sign * tl.sum(grad * x_partner, axis=0)
        tl.store(slope_ptr + (part * rotations + k) * channels + group * G + column, slope)
        x = cos * x - sin * x_partner
        grad = cos * grad - sin * tl.gather(grad, partners, axis=1)
