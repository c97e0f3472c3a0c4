"""Prepare packed linears for the Triton kernels: repack them once, and merge those that read the same input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...core.grids import MxGrid, grid_of
from ...core.packing import pack, unpack
from ...core.rotation import channel_form
from ...spec.codes import AWQ_ORDER
from ...spec.linear import LinearLayout, PackedLinear
from ...spec.mx import MX_BLOCK
from .layout import KERNEL_ROWS, KernelLayout

#: The most programs of one launch that share tiles: four for each multiprocessor of any GPU.
MOST_PROGRAMS = 1024
#: The most linears that one launch of a kernel can run.
MAX_SEGMENTS = 3


@dataclass(frozen=True)
class RotationWeights:
    """T transforms of the same C input channels, in the form of `core.rotation.channel_form`.

    The channels are cut into KB blocks of 128; the last block is padded.
    coefficients: float32 [T, KB, K, 2, 128], cosines and signed sines.
    partners: int32 [T, KB, K, 128], counted from the block's first channel.
    scales: [T, C], the factors 1/a that activations are multiplied by.
    matrix: None until `launch.with_matrix` has built it: float16 [T, 128, 128 KB], diag(1/a) R of each block, its columns
    in `mma_order`; without any columns if the transform leaves x as it is.
    """

    coefficients: Tensor
    partners: Tensor
    scales: Tensor
    group_size: int
    matrix: Tensor | None = None

    @classmethod
    def build(cls, theta: Tensor, pairs: Tensor, scales: Tensor, group_size: int) -> RotationWeights:
        """Arrange stored transforms for the kernels: theta [T, K, C/2], pairs [T, K, C], scales [T, C]."""
        rotations, channels = pairs.shape[1:]
        padding = -channels % 128
        coefficients, partners = [], []
        for one_theta, one_pairs in zip(theta, pairs, strict=True):
            by_channel, partner = channel_form(one_theta, one_pairs, group_size)
            first_in_block = torch.arange(channels, device=pairs.device) // group_size * group_size % 128
            by_channel = torch.nn.functional.pad(by_channel.float(), (0, padding))
            partner = torch.nn.functional.pad(partner.to(torch.int32) + first_in_block.to(torch.int32), (0, padding))
            coefficients.append(by_channel.view(rotations, 2, (channels + padding) // 128, 128).permute(2, 0, 1, 3))
            partners.append(partner.view(rotations, (channels + padding) // 128, 128).transpose(0, 1))
        return cls(torch.stack(coefficients).contiguous(), torch.stack(partners).contiguous(), scales, group_size)

    @property
    def idle(self) -> bool:
        """Whether the transform is known to leave x as it is."""
        return self.matrix is not None and self.matrix.shape[-1] == 0

    @property
    def transforms(self) -> int:
        return self.coefficients.shape[0]

    @property
    def channels(self) -> int:
        return self.scales.shape[-1]

    @property
    def rotations(self) -> int:
        return self.coefficients.shape[2]


@dataclass(frozen=True)
class KernelWeights:
    """One to three packed linears that read the same input, in `KernelLayout`.

    words: int32 [NP / 16, KB, 64 b] for codes of b bits; grid: int32 [KB · S, NP], or for codes in MXFP4 float32.
    arrivals: int32 zeros, in which the programs of a launch count how many of them have finished. For this reason the same
    linear must not run on two streams at the same time.
    rotation: one transform (T = 1) if all linears share it, else one for each linear.
    out_features: of each linear.
    row_scales: None, or if activations are rounded to 8 bits and such scales suffice (`row_scales`) float32 [NP], scales by which
    all weights of a row fit into 8 bits (`launch_rounded.with_row_scales`). Only weights with a dense rotation matrix can have them.
    decoded: None, or if it is kept 16-bit [sum of out_features, C], the weight in the original basis (`decoded_budget`).
    """

    words: Tensor
    grid: Tensor
    arrivals: Tensor
    rotation: RotationWeights
    out_features: tuple[int, ...]
    row_scales: Tensor | None = None
    decoded: Tensor | None = None

    @classmethod
    def build(cls, linears: Sequence[PackedLinear]) -> KernelWeights:
        """Repack the linears, whose layouts must be equal except for out_features."""
        words, grid = repacked(linears)
        first = linears[0]
        shared = all(linear.shares_transform_with(first) for linear in linears[1:])
        distinct = linears[:1] if shared else linears
        rotation = RotationWeights.build(
            torch.stack([linear["theta"].float() for linear in distinct]),
            torch.stack([linear["pairs"] for linear in distinct]),
            torch.cat([linear["channel_scales"] for linear in distinct]),
            first.layout.group_size,
        )
        arrivals = torch.zeros(max(MOST_PROGRAMS, words.shape[0]), dtype=torch.int32, device=words.device)
        return cls(words, grid, arrivals, rotation, tuple(linear.layout.out_features for linear in linears))

    @property
    def layout(self) -> KernelLayout:
        group_size = MX_BLOCK if self.floating else self.rotation.group_size
        return _layout(self.rotation.channels, self.out_features, group_size)

    @property
    def floating(self) -> bool:
        """Whether codes are the floats of MXFP4."""
        return self.grid.dtype == torch.float32

    @property
    def bits(self) -> int:
        return self.words.shape[2] // 64

    def stored(self, index: int, layout: LinearLayout) -> dict[str, Tensor]:
        """Return the codes and the grid of the linear `index`, bit for bit as they were loaded."""
        start = self.layout.starts[index]
        rows = slice(start // 16, (start + self.layout.padded(layout.out_features)) // 16)
        grid = self.grid[: layout.in_features // self.layout.group_size, start : start + layout.out_features]
        qweight = _qweight(self.words[rows], layout)
        if self.floating:
            return {"qweight": qweight, **MxGrid(grid.T).tensors()}
        return {
            "qweight": qweight,
            "qzeros": pack((grid >> 16).to(torch.uint8), self.bits),
            "scales": grid.to(torch.int16).view(torch.float16),
        }

    def tensors(self) -> list[Tensor]:
        """Return all tensors in one list, which `pairquant::rotated_linear` takes and `of_tensors` reads."""
        r = self.rotation
        optional = [tensor for tensor in (r.matrix, self.row_scales, self.decoded) if tensor is not None]
        return [self.words, self.grid, self.arrivals, r.coefficients, r.partners, r.scales, *optional]

    @staticmethod
    def channels(tensors: Sequence[Tensor]) -> int:
        """Return C of the weights whose `tensors()` is this list."""
        return tensors[5].shape[-1]

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor], out_features: Sequence[int], group_size: int) -> KernelWeights:
        """Return the weights whose `tensors()` is this list."""
        words, grid, arrivals, coefficients, partners, scales, *optional = tensors
        rotation = RotationWeights(coefficients, partners, scales, group_size, *optional[:1])
        rest = {("row_scales" if tensor.ndim == 1 else "decoded"): tensor for tensor in optional[1:]}
        return cls(words, grid, arrivals, rotation, tuple(out_features), **rest)


@lru_cache
def _layout(channels: int, out_features: tuple[int, ...], group_size: int) -> KernelLayout:
    """Return the layout, the same object for equal arguments, as what it computes takes longer than finding it."""
    return KernelLayout(channels, out_features, group_size)


#: Rows repacked at a time. With 16384 input channels, the temporary tensors then take about 150 MB at most at 4 bits, which are
#: not unpacked, and 400 MB at others.
ROWS_AT_A_TIME = 4096


def repacked(linears: Sequence[PackedLinear]) -> tuple[Tensor, Tensor]:
    """Repack the stored tensors of linears of equal in_features into words and grid, with padded rows, one after the other."""
    s = linears[0].layout
    tile = KERNEL_ROWS * s.bits // 32  # columns of stored words that hold one tile of rows
    columns = torch.cat([_padded(linear["qweight"], tile) for linear in linears], dim=1)
    words = torch.cat([_words(part, s.bits) for part in columns.split(ROWS_AT_A_TIME // KERNEL_ROWS * tile, dim=1)])
    if s.weights is not None:
        scales = torch.cat([_padded(grid_of(linear).scale.T, KERNEL_ROWS) for linear in linears], dim=1)
        return words, _whole_blocks(scales, s.in_features)
    zeros = unpack(torch.cat([_padded(linear["qzeros"], tile) for linear in linears], dim=1), s.bits)
    scales = torch.cat([_padded(linear["scales"], KERNEL_ROWS) for linear in linears], dim=1)
    grid = (scales.view(torch.int16).to(torch.int32) & 0xFFFF) | (zeros.to(torch.int32) << 16)
    return words, _whole_blocks(grid, s.in_features)


def _whole_blocks(grid: Tensor, channels: int) -> Tensor:
    """Pad the grid of so many channels with rows of zeros to whole blocks of 128 channels."""
    missing = -channels % 128 * len(grid) // channels
    return torch.nn.functional.pad(grid, (0, 0, 0, missing)) if missing else grid


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    """Pad the columns with zeros to a multiple of this number."""
    return torch.nn.functional.pad(tensor, (0, -tensor.shape[1] % multiple)) if tensor.shape[1] % multiple else tensor


def _words(qweight: Tensor, bits: int) -> Tensor:
    """Repack qweight, int32 [C, N · b / 32], to the words of `KernelLayout`, int32 [NP / 16, KB, 64 b]."""
    if bits == 4:
        return _fragments(qweight)
    codes = unpack(qweight, bits)
    low = _fragments(_nibbles(codes & 15))
    if bits < 4:
        parts = [_two_bits(low & 0x33333333)] + [_one_bit((low >> 2) & 0x11111111)] * (bits == 3)
    else:
        high = _fragments(_nibbles(codes >> 4))
        parts = [low, _one_bit(high) if bits == 5 else _two_bits(high) if bits == 6 else high]
    return torch.cat(parts, dim=-1)


def _qweight(words: Tensor, layout: LinearLayout) -> Tensor:
    """Undo `_words`, without the padding."""
    bits = layout.bits
    if bits < 4:
        low = _from_two_bits(words[..., :128])
        if bits == 3:
            low |= _from_one_bit(words[..., 128:]) << 2
    else:
        low = words[..., :256]
    stored = _stored_words(low)[: layout.in_features, : layout.out_features // 8]
    if bits == 4:
        return stored.contiguous()
    codes = unpack(stored.contiguous(), 4)
    if bits > 4:
        rest = words[..., 256:]
        high = _from_one_bit(rest) if bits == 5 else _from_two_bits(rest) if bits == 6 else rest
        stored = _stored_words(high)[: layout.in_features, : layout.out_features // 8]
        codes |= unpack(stored.contiguous(), 4) << 4
    return pack(codes, bits)


def _nibbles(codes: Tensor) -> Tensor:
    """Pack codes below 16, uint8 [C, N], as those of 4 bits are stored: int32 [C, N / 8]."""
    columns = codes.view(len(codes), -1, 8)[..., list(AWQ_ORDER)]
    return (columns[..., 0::2] | (columns[..., 1::2] << 4)).view(torch.int32).squeeze(-1)


def _two_bits(nibbles: Tensor) -> Tensor:
    """Store nibbles of two bits in half as many words: [R, KB, 256] → [R, KB, 128]."""
    first, second = nibbles.chunk(2, dim=-1)
    return first | (second << 2)


def _from_two_bits(words: Tensor) -> Tensor:
    return torch.cat([words & 0x33333333, (words >> 2) & 0x33333333], dim=-1)


def _one_bit(nibbles: Tensor) -> Tensor:
    """Store nibbles of one bit in a quarter as many words: [R, KB, 256] → [R, KB, 64]."""
    first, second = nibbles.chunk(2, dim=-1)
    both = first | (second << 2)
    return both[..., 0::2] | (both[..., 1::2] << 1)


def _from_one_bit(words: Tensor) -> Tensor:
    both = torch.stack([words, words >> 1], dim=-1).flatten(-2)
    return torch.cat([both & 0x11111111, (both >> 2) & 0x11111111], dim=-1)


def _fragments(qweight: Tensor) -> Tensor:
    """Repack words of nibbles, int32 [C, N / 8], to int32 [NP / 16, KB, 256], in the order rh, r, t, c (see `KernelLayout`).

    The codes are not unpacked. Byte (b1, b0) of a stored word holds rows 4 b0 + 2 e + b1 of its eight, for e = 0, 1 (AWQ's
    order). Byte (i0, h) of a kernel's word holds channels 2 i1 + i0, for i1 = 0, 1. So nibbles are exchanged between two
    bytes, then the bytes are put in order. Padding has codes of zero.
    """
    channels, words = qweight.shape
    padded = torch.nn.functional.pad(qweight, (0, -words % (KERNEL_ROWS // 8), 0, -channels % 128))
    rows = padded.shape[1] // 2
    stored = padded.view(torch.uint8).view(-1, 4, 2, 4, 2, 2, rows, 2, 2, 2)  # KB c h t i1 i0 R rh b1 b0
    first, second = _exchanged(*stored.unbind(4))
    placed = torch.stack((first, second), dim=-1)  # KB c h t i0 R rh b1 b0 e
    ordered = placed.permute(5, 0, 6, 8, 9, 7, 3, 1, 4, 2)  # R KB rh b0 e b1 t c i0 h
    return ordered.flatten(-2).view(torch.int32).view(rows, -1, 256)


def _stored_words(words: Tensor) -> Tensor:
    """Undo `_fragments`, but keep the padding: int32 [128 KB, NP / 8]."""
    ordered = (
        words.contiguous().view(torch.uint8).view(*words.shape[:2], 2, 2, 2, 2, 4, 4, 2, 2)
    )  # R KB rh b0 e b1 t c i0 h
    placed = ordered.permute(1, 7, 9, 6, 8, 0, 2, 5, 3, 4)  # KB c h t i0 R rh b1 b0 e
    stored = torch.stack(_exchanged(*placed.unbind(-1)), dim=4)
    return stored.flatten(-2).view(torch.int32).view(words.shape[1] * 128, words.shape[0] * 2)


def _exchanged(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Exchange the high nibbles of the first with the low nibbles of the second, both uint8; twice undoes it."""
    return (first & 15) | (second << 4), (first >> 4) | (second & 0xF0)
