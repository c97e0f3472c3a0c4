"""Pack codes into 32-bit words and unpack them again, without any loss (for the bit order see `spec.codes`)."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from ..spec.codes import AWQ_ORDER, columns_per_block


def pack(codes: Tensor, bits: int, natural: bool = False) -> Tensor:
    """Pack codes, uint8 [rows, N], into words, int32 [rows, N · b / 32]; N must be a multiple of `columns_per_block(bits)`.

    natural: leave the codes in their order at 4 bits too, as other formats do; `unpack` reads what was packed without it.
    """
    columns = codes.view(len(codes), -1, columns_per_block(bits)) if natural else _stored_order(codes, bits)
    if 8 % bits == 0:  # no code straddles two bytes, and a word has its lowest byte first
        parts = columns.to(torch.uint8).reshape(len(codes), -1, 8 // bits).unbind(-1)
        return reduce(torch.add, (part << place * bits for place, part in enumerate(parts))).view(torch.int32)
    columns = columns.long()
    rows, blocks, per_block = columns.shape
    words = torch.zeros(rows, blocks, per_block * bits // 32, dtype=torch.int64, device=codes.device)
    for column in range(per_block):
        word, shift = divmod(column * bits, 32)
        words[..., word] |= columns[..., column] << shift
        if shift + bits > 32:  # a code of 3, 5 or 6 bits can straddle two words
            words[..., word + 1] |= columns[..., column] >> (32 - shift)
    # Keep the low 32 bits, then interpret them as a signed number, as int32 does.
    words &= 0xFFFFFFFF
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).view(rows, -1)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unpack words, int32 [rows, N · b / 32], into codes, uint8 [rows, N]."""
    rows = words.shape[0]
    per_block = columns_per_block(bits)
    blocks = words.view(rows, -1, per_block * bits // 32)
    mask = 2**bits - 1
    columns = torch.empty(*blocks.shape[:2], per_block, dtype=torch.uint8, device=words.device)
    for column in range(per_block):
        word, shift = divmod(column * bits, 32)
        # The shift is arithmetic, but the mask drops the copies of the sign bit.
        code = (blocks[..., word] >> shift) & mask
        if shift + bits > 32:
            low_bits = 32 - shift
            code = (code & (2**low_bits - 1)) | ((blocks[..., word + 1] << low_bits) & mask)
        columns[..., column] = code.to(torch.uint8)
    return _natural_order(columns, bits)


def _stored_order(codes: Tensor, bits: int) -> Tensor:
    columns = codes.view(codes.shape[0], -1, columns_per_block(bits))
    return columns[..., list(AWQ_ORDER)] if bits == 4 else columns


def _natural_order(columns: Tensor, bits: int) -> Tensor:
    if bits == 4:
        columns = columns[..., [AWQ_ORDER.index(column) for column in range(8)]]
    return columns.reshape(columns.shape[0], -1)
