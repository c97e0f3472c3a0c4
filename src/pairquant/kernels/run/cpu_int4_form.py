"""Read codes back from the form in which PyTorch's int4 product on CPUs holds them.

PyTorch does not document the form, and it differs with the CPU's instructions. What all forms have in common: each block of
`BLOCK` rows, and the rows that remain after the last whole block, are packed by themselves into the bytes of as many rows, and
each code fills half of a byte. Which half is found by packing numbers that tell where they were.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ...support.errors import KernelError

#: Rows of a block.
BLOCK = 64


def int4_form(codes: Tensor) -> Tensor:
    """Return codes of 4 bits, integers [N, C], as the product reads them: uint8 [N, C/2]. N must be a multiple of 16."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)


def codes_of(form: Tensor, first: int, last: int) -> Tensor:
    """Return the codes of the rows from first up to, not including, last of what `int4_form` gave: uint8 [last - first, C].

    Raises `KernelError` if this version of PyTorch packs otherwise than described above.
    """
    rows, channels = len(form), 2 * form.shape[1]
    _require_known(channels, rows % BLOCK)
    start, stop = first // BLOCK * BLOCK, min(-(-last // BLOCK) * BLOCK, rows)
    return _codes(form[start:stop])[first - start : last - start]


def _codes(form: Tensor) -> Tensor:
    whole = len(form) // BLOCK * BLOCK
    parts = [(form[:whole], BLOCK), (form[whole:], len(form) - whole)]
    return torch.cat([_codes_of_blocks(part, rows) for part, rows in parts if len(part)])


def _codes_of_blocks(form: Tensor, rows: int) -> Tensor:
    """Return the codes of blocks of so many rows, one below the other."""
    channels = 2 * form.shape[1]
    halves = _halves(form.reshape(len(form) // rows, -1))
    return halves.index_select(1, _places(rows, channels)).view(-1, channels)


def _halves(form: Tensor) -> Tensor:
    """Return the low, then the high half of each byte: uint8 [B, n] → [B, 2 n]."""
    return torch.stack((form & 15, form >> 4), -1).flatten(-2)


@cache
def _places(rows: int, channels: int) -> Tensor:
    """Return in which half byte of a block's form each of its codes lies: int32 [rows · channels]."""
    numbers = torch.arange(rows * channels, dtype=torch.int32)
    held = torch.zeros_like(numbers)  # by each half byte: the number of a code, of which every packing tells four bits
    for shift in range(0, (len(numbers) - 1).bit_length(), 4):
        form = int4_form((numbers >> shift & 15).view(rows, channels))
        held += _halves(form.flatten()).int() << shift
    places = torch.empty_like(numbers)
    places[held.long()] = numbers
    return places


@cache
def _require_known(channels: int, rest: int) -> None:
    """Check on random codes, of two blocks and so many rows more, that the form is as described above."""
    codes = torch.randint(0, 16, (2 * BLOCK + rest, channels), generator=torch.Generator().manual_seed(0))
    if not torch.equal(_codes(int4_form(codes)), codes):
        raise KernelError(
            f"PyTorch {torch.__version__} packs 4-bit codes on CPUs in a way that PairQuant cannot read back. Load the model "
            "again to save or move it before it has run, or install another version of PyTorch."
        )
