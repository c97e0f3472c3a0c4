"""Run quantized layers on a CPU: one small matrix per group holds all K rotations and the scales, then a product follows.

Up to `FEW_TOKENS` tokens it is PyTorch's int4 product, which decodes the codes again for every four tokens. For more, the
codes are decoded once, a cache-sized tile of rows after another, and PyTorch's bfloat16 product (AVX-512 or AMX)
multiplies by the tile. On CPUs without instructions for bfloat16 the int4 product is faster at every number of tokens.
Where decoded weights are kept (`decoded_budget`), they multiply more than `FEW_BESIDE_DECODED` tokens.

For one token of 4096 channels on two threads, rotating in K steps takes 226 to 325 us, the product with the matrices 20 to
36 us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.activations import rounded
from ...core.linear import Transform, transform_of
from ...core.linear import decode as decoded_weight
from ...core.packing import unpack
from ...core.rotation import rotate_dense
from ...spec.linear import PackedLinear
from .cpu_int4_form import int4_form

#: PyTorch's int4 product on CPUs packs this many output rows together.
INT4_ROWS = 16
#: Up to this many tokens the int4 product is as fast as decoding: 4096 → 14336 on one core of an EPYC 9005, 24 tokens 17 against
#: 19 ms, 32 tokens 23 against 22; on two cores 32 tokens 11 against 11, 64 tokens 22 against 14.
FEW_TOKENS = 32
#: Up to this many tokens the int4 product and its rotation are faster than the decoded weight: 4096 → 14336, 8 tokens 5.7 against
#: 7.0 ms, 12 tokens 8.7 against 8.3.
FEW_BESIDE_DECODED = 8
#: From this many tokens on, activations are rotated in bfloat16: two products of halves, whose preparation costs 40 us.
MANY_TOKENS = 96
#: Weights of one decoded tile (4 MB in float32, 2 MB in bfloat16), and the rows that a tile has a multiple of.
TILE, TILE_ROWS = 2**20, 64
#: Values that are rotated at once, so that they stay in a core's cache.
ROTATED = 2**17
#: Group scales above this are divided by `SHRINK`, so that the zero point times the scale, at most 15 times as large, fits fp16.
LARGE_SCALE, SHRINK = 4096.0, 16.0


@dataclass(frozen=True)
class CpuCodes:
    """The codes of N rows, prepared for both products.

    packed: as `int4_form` returns them.
    grid: bfloat16 [G, N, 2], scale and (8 - z) · scale, because the product computes (q - 8) · scale + zero.
    rows: uint8 [N · G, g/2 + 4], what `quantized::embedding_bag_4bit_unpack` decodes: two codes in a byte, the first one in its
    low half, then the scale and - z · scale as float16. Empty, [0, g/2 + 4], where it is not needed: `multiplies_bfloat16` is
    False, the decoded weight is kept, or another product multiplies many tokens.
    dense: bfloat16 [N, C], the decoded weight in the original basis, if it is kept; else [0, C].
    """

    packed: Tensor
    grid: Tensor
    rows: Tensor
    dense: Tensor


@dataclass(frozen=True)
class CpuWeights:
    """Linears that read the same input, prepared for the CPU.

    matrix: float32 [S, G, g, g], diag(1/a) R of each of S transforms. In bfloat16 it would add an error as large as that of
    rounding the activations. Without rotations it is [S, G, g, 1], the factors 1/a alone.
    codes: of the rows that each transform serves, S of them.
    """

    matrix: Tensor
    codes: tuple[CpuCodes, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> CpuWeights:
        """Return the weights whose `tensors()` these are."""
        return cls(tensors[0], tuple(CpuCodes(*tensors[i : i + 4]) for i in range(1, len(tensors), 4)))

    def tensors(self) -> list[Tensor]:
        """Return the matrix, then the four tensors of the codes of each transform."""
        return [self.matrix, *(tensor for c in self.codes for tensor in (c.packed, c.grid, c.rows, c.dense))]


@cache
def multiplies_bfloat16() -> bool:
    """Tell whether the CPU has instructions that multiply bfloat16, and PyTorch uses them (AVX-512 BF16 or AMX).

    `ATEN_CPU_CAPABILITY=avx2` makes it False.
    """
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has and torch.backends.cpu.get_cpu_capability() == "AVX512"


def build(linear: PackedLinear, keep_decoded: bool = False, many_tokens: bool = True) -> CpuWeights:
    """Prepare a 4-bit linear. keep_decoded: also decode the weight, to be kept; many_tokens: whether it will run more than
    `FEW_TOKENS`, for which `rows` are needed."""
    matrix = factors(transform_of(linear))
    groups, g, _ = matrix.shape
    scales, shrink = linear["scales"].float(), shrink_of(linear)
    codes = unpack(linear["qweight"], 4).T.contiguous()
    zeros = unpack(linear["qzeros"], 4).float()
    packed = int4_form(codes)
    tiles = multiplies_bfloat16() and many_tokens and not keep_decoded
    rows = _rows(codes, scales / shrink, zeros) if tiles else codes.new_empty(0, g // 2 + 4)
    dense = decoded_weight(linear) if keep_decoded else torch.empty(0, groups * g)
    found = CpuCodes(packed, _grid(scales / shrink, zeros), rows, dense.bfloat16())
    return CpuWeights((matrix * shrink)[None], (found,))


def factors(transform: Transform) -> Tensor:
    """Return diag(1/a) R of a transform, float32 [G, g, g]; without rotations the factors 1/a alone, [G, g, 1]."""
    groups, g, _ = transform.matrix.shape
    inverse = transform.inverse_scales.view(groups, g, 1)
    return inverse * transform.matrix if len(transform.theta) else inverse


def shrink_of(linear: PackedLinear) -> float:
    """Return what the scales of a linear are divided by, and its matrix is multiplied by; see `LARGE_SCALE`."""
    return SHRINK if bool((linear["scales"].float() > LARGE_SCALE).any()) else 1.0


def joined(parts: Sequence[CpuWeights]) -> CpuWeights:
    """Return the weights of linears with different transforms as one."""
    return CpuWeights(torch.cat([part.matrix for part in parts]), tuple(code for part in parts for code in part.codes))


def int4_weights(linear: PackedLinear) -> tuple[Tensor, Tensor]:
    """Return `packed` and `grid` of `CpuCodes`, for a 4-bit linear."""
    grid = _grid(linear["scales"].float(), unpack(linear["qzeros"], 4).float())
    return int4_form(unpack(linear["qweight"], 4).T.contiguous()), grid


def _grid(scales: Tensor, zeros: Tensor) -> Tensor:
    """Return `grid` of `CpuCodes`. scales, zeros: float32 [G, N]."""
    # The zero points times the rounded scales: then the rounding of a scale does not shift the whole group.
    scales = scales.bfloat16().float()
    return torch.stack((scales, (8 - zeros) * scales), dim=-1).bfloat16()


def _rows(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return `rows` of `CpuCodes`. codes: uint8 [N, C]; scales, zeros: float32 [G, N]."""
    pairs = codes.view(scales.numel(), -1, 2)
    grid = torch.stack((scales.T, (-zeros * scales).T), dim=-1).half().contiguous()
    return torch.cat((pairs[..., 0] | pairs[..., 1] << 4, grid.view(-1, 2).view(torch.uint8)), dim=1)


def rotated(x: Tensor, matrix: Tensor, activations: str | None = None, group_size: int = 0) -> Tensor:
    """Transform x, bfloat16 [M, C], by each of S transforms, float32 [S, G, g, g] or [S, G, g, 1]: bfloat16 [S, M, C].

    activations: the format that the result is rounded to, from float32, in groups of group_size; None for none.
    """
    if activations is None:
        return turned(x, matrix, torch.bfloat16)
    return rounded(turned(x, matrix, torch.float32), activations, group_size).bfloat16()


def turned(x: Tensor, matrix: Tensor, kept_as: torch.dtype) -> Tensor:
    """Transform x, bfloat16 [M, C], as `rotated` does, into bfloat16 or float32: [S, M, C]."""
    transforms, groups, g, width = matrix.shape
    tokens, channels = x.shape
    if width == 1:
        return (x.float() * matrix.view(transforms, 1, channels)).to(kept_as)
    by_parts = tokens >= MANY_TOKENS and multiplies_bfloat16() and kept_as == torch.bfloat16
    turn = _by_parts(matrix) if by_parts else _by_float32(matrix)
    result = torch.empty(transforms, tokens, channels, dtype=kept_as)
    step = max(1, ROTATED // (channels * transforms))
    for first in range(0, tokens, step):
        some = x[first : first + step]
        target = result[:, first : first + step].view(transforms, -1, groups, g)
        target.transpose(1, 2).copy_(turn(some.view(-1, groups, g).transpose(0, 1)))
    return result


def _by_float32(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what multiplies bfloat16 [G, M, g] by the matrix [S, G, g, g], in float32: [S, G, M, g]."""
    if len(matrix) == 1:
        return lambda some: torch.bmm(some.float(), matrix[0])[None]
    return lambda some: torch.matmul(some.float(), matrix)


def _by_parts(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what does the same in bfloat16: [x, x] times the matrix in two parts, its rounded values and what they lack.

    576 channels, 128 tokens, one core of an EPYC 9005: 42 us for one part alone, 92 us in float32.
    """
    high = matrix.bfloat16()
    both = torch.cat((high, (matrix - high).bfloat16()), dim=-2)
    return lambda some: torch.matmul(torch.cat((some, some), dim=-1), both)


def int4_product(x_rot: Tensor, packed: Tensor, grid: Tensor, group_size: int) -> Tensor:
    """Multiply what is in the rotated basis already: x_rot [M, C] bfloat16 → [M, N]."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x_rot, packed, group_size, grid)


def decoded_product(x_rot: Tensor, rows: Tensor, out_features: int) -> Tensor:
    """Multiply what is in the rotated basis by `rows` of `CpuCodes`, decoded tile by tile: [M, C] bfloat16 → [M, N]."""
    tokens, channels = x_rot.shape
    groups = len(rows) // out_features
    height = max(TILE_ROWS, TILE // channels // TILE_ROWS * TILE_ROWS)
    y = x_rot.new_empty(tokens, out_features)
    workspace = x_rot.new_empty(min(height, out_features), channels)
    for first in range(0, out_features, height):
        tile = workspace[: min(height, out_features - first)]
        some = rows[first * groups : (first + len(tile)) * groups]
        tile.copy_(torch.ops.quantized.embedding_bag_4bit_unpack(some).view(tile.shape))
        y[:, first : first + len(tile)] = F.linear(x_rot, tile)
    return y


def rotated_linear(
    x: Tensor, weights: CpuWeights, bias: Tensor | None, group_size: int, activations: str | None = None
) -> Tensor:
    """Run linears that read the same input on x, bfloat16 [M, C], with their bias if they have one: bfloat16 [M, N].

    activations: the format that the rotated x is rounded to, None for none.
    """
    if len(x) > FEW_BESIDE_DECODED and len(weights.codes[0].dense):
        found = [F.linear(x, codes.dense) for codes in weights.codes]
    else:
        x_rot = rotated(x, weights.matrix, activations, group_size)
        found = [_product(x_rot[i], codes, group_size) for i, codes in enumerate(weights.codes)]
    y = found[0] if len(found) == 1 else torch.cat(found, dim=-1)
    return y if bias is None else y.add_(bias)


def _product(x_rot: Tensor, codes: CpuCodes, group_size: int) -> Tensor:
    if len(x_rot) > FEW_TOKENS and len(codes.rows):
        return decoded_product(x_rot, codes.rows, len(codes.packed))
    return int4_product(x_rot, codes.packed, codes.grid, group_size)


def decode(matrix: Tensor, codes: CpuCodes, group_size: int) -> Tensor:
    """Return the dense weight, float32 [N, C], of the codes of one transform, [G, g, g] or [G, g, 1].

    The packed form is opaque: its product with the identity is the rotated weight.
    """
    eye = torch.eye(len(matrix) * group_size, dtype=torch.bfloat16)
    weight = int4_product(eye, codes.packed, codes.grid, group_size).T.float()
    return rotate_dense(weight, matrix.mT) if matrix.shape[-1] > 1 else weight * matrix.flatten()
