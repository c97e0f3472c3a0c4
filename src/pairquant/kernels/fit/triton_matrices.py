"""Triton kernels that compute the dense R of every group, and the gradient of its angles.

A program keeps some rows of one group's matrix in registers and applies all K rotations to them; a gather along the row
fetches each channel's partner. The backward kernel goes through the rotations in reverse. It needs the matrix between any
two rotations, and gets it by undoing them, which is possible because they are orthogonal; so nothing has to be kept.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotation(theta_ptr, partner_ptr, slot_ptr, k, channels, channel, ROWS: tl.constexpr, G: tl.constexpr):
    """Load rotation k of G channels: partners [ROWS, G], cosines and signed sines [1, G], signs of the sines [G]."""
    at = k * channels + channel
    partner = tl.load(partner_ptr + at)
    slot = tl.load(slot_ptr + at)
    sign = tl.where(slot < 0, -1.0, 1.0)
    slot = tl.where(slot < 0, -slot - 1, slot)  # for a pair's second channel, -1 - slot is stored
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
    """Compute ROWS rows of R of one group, by applying all rotations to rows of the identity."""
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
    slope_ptr,  # float32 [g/ROWS, K, C], written: what these rows and each channel add to the gradient of the channel's angle
    channels,
    rotations,
    ROWS: tl.constexpr,
    G: tl.constexpr,
):
    """Compute what ROWS rows of one group's R add to the gradient of the angles."""
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
