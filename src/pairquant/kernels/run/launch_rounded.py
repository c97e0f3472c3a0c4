"""Launch the Triton kernels that round activations to 8 bits and multiply what was rounded.

The caller must have checked the tensors, as for `launch`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core.activations import rounded
from ...spec.activations import FORMATS
from ...support.devices import current
from ...support.errors import KernelError
from . import launch
from .launch import cdiv, dependent, features, multiprocessors, scratch
from .start import start
from .table import Bytes, Narrow, RoundedChoice, RowBytes, WholeBytes, Wide
from .triton_round import round_kernel
from .triton_row_bytes import decode_rows_kernel, row_bytes_kernel
from .triton_wide_bytes import described, whole_bytes_kernel, wide_bytes_kernel
from .weights import KernelWeights, RotationWeights

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Rounded:
    """Rotated activations of M tokens, for T transforms.

    codes: int8 or float8_e4m3fn [T, M, 128 KB], zeros beyond C, the channels in their usual order; scales: float32 [T, M].
    """

    codes: Tensor
    scales: Tensor

    @property
    def rows(self) -> Tensor:
        """The codes of all transforms, one below the other."""
        return self.codes.view(-1, self.codes.shape[-1])


def codes(x: Tensor, rotation: RotationWeights, activations: str) -> Rounded:
    """Scale, rotate and round x [M, C] to "int8" or "fp8"."""
    relative, peaks = launch.rotate_relative(x, rotation)
    out = Rounded(
        torch.empty(relative.shape, dtype=CODES[activations], device=x.device), torch.empty_like(peaks[..., 0])
    )
    _round(relative, peaks, out.codes, out.scales, activations, mma_order=False)
    return out


def values(x: Tensor, rotation: RotationWeights, activations: str, mma_order: bool, activation: str = "") -> Tensor:
    """Scale, rotate and round x [M, C] to any format, and return the values, [T, M, 128 KB] in x's dtype, for products of 16 bits.

    mma_order: for kernels that read channels in `mma_order`; activation: of `triton_rotate.load_input`, for x [M, 2 C], or "".
    """
    if activations not in CODES:
        return _simulated(x, rotation, activations, mma_order, activation)
    relative, peaks = launch.rotate_relative(x, rotation, activation)
    out = torch.empty(relative.shape, dtype=x.dtype, device=x.device)
    _round(relative, peaks, out, peaks, activations, mma_order)
    return out


def product(
    given: Rounded,
    weights: KernelWeights,
    bias: Tensor | None,
    choice: Bytes | WholeBytes | RowBytes,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply rounded activations by the rotated weight, as 8-bit numbers: [M, sum of out_features] in this dtype.

    `RowBytes` need `weights.row_scales`. bias: [sum of out_features] in this dtype, or None.
    """
    out = torch.empty(given.codes.shape[1], sum(weights.out_features), dtype=dtype, device=given.codes.device)
    with current(out.device):
        if isinstance(choice, Bytes):
            _wide(given, weights, bias, choice, out)
        elif isinstance(choice, WholeBytes):
            _whole(given, weights, bias, choice, out)
        else:
            _by_row(given, weights, bias, choice, out)
    return out


#: Tiles of tokens that follow one another for the same rows.
TOGETHER = 8


def _wide(given: Rounded, weights: KernelWeights, bias: Tensor | None, choice: Bytes, out: Tensor) -> None:
    layout, tokens = weights.layout, len(out)
    tiles = layout.padded_rows // choice.rows * cdiv(tokens, choice.tokens)
    most = min(multiprocessors(out.device) * choice.waves, weights.arrivals.numel())
    programs = min(most, tiles * layout.k_blocks)
    whole = tiles % programs == 0
    wide_bytes_kernel[(programs,)](
        described(given.rows, [choice.tokens, 128 // layout.groups_per_block]),
        given.scales,
        weights.words,
        weights.grid,
        out if bias is None else bias,
        out,
        out if whole else scratch(out.device, programs, 2, choice.rows, choice.tokens),
        weights.arrivals,
        tokens,
        layout.k_blocks,
        layout.padded_rows // 128,
        out.shape[1] // 8,
        *layout.segments,
        BN=choice.rows,
        BM=choice.tokens,
        STAGES=choice.stages,
        GROUPS=layout.groups_per_block,
        BITS=weights.bits,
        num_warps=choice.warps,
        **_options(given, bias, out),
    )


def _whole(given: Rounded, weights: KernelWeights, bias: Tensor | None, choice: WholeBytes, out: Tensor) -> None:
    layout, tokens = weights.layout, len(out)
    whole_bytes_kernel[(layout.padded_rows // choice.rows * cdiv(tokens, 2 * choice.half),)](
        described(given.rows, [choice.half, 128 // layout.groups_per_block]),
        given.scales,
        weights.words,
        weights.grid,
        out if bias is None else bias,
        out,
        tokens,
        layout.k_blocks,
        layout.padded_rows // 128,
        out.shape[1] // 8,
        *layout.segments,
        BN=choice.rows,
        HALF=choice.half,
        STAGES=choice.stages,
        GROUPS=layout.groups_per_block,
        BITS=weights.bits,
        num_warps=choice.warps,
        **_options(given, bias, out),
    )


def _by_row(given: Rounded, weights: KernelWeights, bias: Tensor | None, choice: RowBytes, out: Tensor) -> None:
    """Decode some rows of the weight into a workspace, then multiply by them; and so on."""
    assert weights.row_scales is not None, "weights for activations of 8 bits have scales for their rows"
    layout, step = weights.layout, choice.step // 128
    tiles = layout.padded_rows // 128
    workspace = torch.empty(min(step, tiles) * 128, layout.k_blocks * 128, dtype=given.codes.dtype, device=out.device)
    for first in range(0, tiles, step):
        last = min(first + step, tiles)
        _decode_rows(weights, weights.row_scales, first, last, workspace)
        row_bytes_kernel[(cdiv(len(out), choice.tokens) * cdiv((last - first) * 128, choice.rows),)](
            described(given.rows, [choice.tokens, 128]),
            described(workspace, [choice.rows, 128]),
            given.scales,
            weights.row_scales,
            out if bias is None else bias,
            out,
            len(out),
            first,
            last,
            layout.k_blocks,
            out.shape[1] // 8,
            *layout.segments,
            BN=choice.rows,
            BM=choice.tokens,
            STAGES=choice.stages,
            num_warps=choice.warps,
            **_options(given, bias, out),
        )


def _options(given: Rounded, bias: Tensor | None, out: Tensor) -> dict[str, int | bool]:
    shared = len(given.codes) == 1
    return {
        "TOGETHER": TOGETHER,
        "SHARED": shared,
        "HAS_BIAS": bias is not None,
        "NATIVE": features(out.device)["NATIVE"],
        **dependent(out.device, shared),
    }


#: Rows of a tile and tiles of a program of `decode_rows_kernel`.
DECODE_ROWS, DECODE_TILES = 128, 4


def _decode_rows(weights: KernelWeights, scales: Tensor, first: int, last: int, out: Tensor) -> None:
    """Write the rows of the tiles [first, last), of 128 padded rows, into out [(last - first) · 128, 128 KB], 8-bit."""
    layout = weights.layout
    start(
        decode_rows_kernel,
        (layout.k_blocks, cdiv((last - first) * 128 // DECODE_ROWS, DECODE_TILES), 1),
        (weights.words, weights.grid, scales, out),
        (first, last, layout.k_blocks, layout.padded_rows // 128),
        BN=DECODE_ROWS,
        TILES=DECODE_TILES,
        GROUPS=layout.groups_per_block,
        BITS=weights.bits,
        STAGES=3,
        NATIVE=features(out.device)["NATIVE"],
        num_warps=8,
    )


def with_row_scales(weights: KernelWeights, activations: str) -> KernelWeights:
    """Return the weights with the scales by which all weights of a row fit into "int8" or "fp8", as `RowBytes` need them."""
    scales = (weights.grid & 0xFFFF).to(torch.int16).view(torch.float16).float()
    zeros = (weights.grid >> 16) & 255
    largest = (scales * torch.maximum(zeros, 2**weights.bits - 1 - zeros)).amax(0)
    return replace(weights, row_scales=(largest / FORMATS[activations].largest).clamp(min=1e-30))


def _simulated(x: Tensor, rotation: RotationWeights, activations: str, mma_order: bool, activation: str) -> Tensor:
    """Do as `values` for formats whose scales span a group or less, by the reference."""
    x_rot = launch.rotate_padded(x.float(), rotation, wide=False, overlap=False, activation=activation)
    found = rounded(x_rot, activations, rotation.group_size).to(x.dtype)
    if mma_order:  # t, i1, i0 → i1, t, i0 (see `KernelLayout`)
        found = found.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4).contiguous()
    return found


#: Channels, in blocks of 128, that a program of `round_kernel` rounds, and of how many tokens.
ROUND_BLOCKS, ROUND_ROWS = 16, 2


def _round(relative: Tensor, peaks: Tensor, out: Tensor, scales: Tensor, activations: str, mma_order: bool) -> None:
    blocks = peaks.shape[2]
    rows = peaks.numel() // blocks
    of_program = ROUND_ROWS if features(out.device)["NATIVE"] else 64  # the interpreter is slow for each program
    start(
        round_kernel,
        (cdiv(rows, of_program), cdiv(blocks, ROUND_BLOCKS), 1),
        (relative, peaks, out, scales),
        (rows, blocks),
        FLOAT8=activations == "fp8",
        VALUES=out.dtype not in CODES.values(),
        MMA_ORDER=mma_order,
        ROWS=of_program,
        BLOCKS=ROUND_BLOCKS,
        ALL_BLOCKS=max(16, 1 << (blocks - 1).bit_length()),
        NATIVE=features(out.device)["NATIVE"],
        num_warps=4,
        **dependent(out.device),
    )


def linear(x: Tensor, weights: KernelWeights, bias: Tensor | None, choice: RoundedChoice, activations: str) -> Tensor:
    """Run the linears on x [M, C], rounded to `activations` in the rotated basis: [M, sum of out_features] in x's dtype.

    activations: a format of `spec.activations`; bias: [sum of out_features] in x's dtype, or None. Raises `KernelError` for
    products of 16 bits of float32 x.
    """
    if not isinstance(choice, Narrow | Wide):
        given = codes(x, weights.rotation, activations)
        return product(given, weights, bias, choice, x.dtype)
    if x.dtype == torch.float32:
        raise KernelError(
            f"x is float32; {weights.bits}-bit layers with {activations} activations multiply float16 or bfloat16. Convert the "
            "model to one of these."
        )
    x_rot = values(x, weights.rotation, activations, isinstance(choice, Wide))
    return launch.product(x_rot, weights, bias, choice)
