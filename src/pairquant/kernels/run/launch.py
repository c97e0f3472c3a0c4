"""Launch the Triton kernels that run quantized layers. The caller chooses the tiles; nothing here reads the table of tiles.

The caller must have checked the tensors (`backends.ops` does): x is 16-bit or float32, has two dimensions, and stride 1 in
the last.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from .start import start
from .table import Dense, Kept, Narrow, Product, Wide
from .triton_decode import decode_kernel
from .triton_linear import narrow_kernel, wide_kernel
from .triton_rotate import dense_rotate_kernel, givens_kernel
from .weights import KernelWeights, RotationWeights

#: For `decode_kernel`: rows per tile, rows per program in units of 128, buffered stages, warps. The fastest of nine choices on
#: an H100.
DECODE_ROWS, DECODE_TILES, DECODE_STAGES, DECODE_WARPS = 128, 4, 3, 8
#: For `dense_rotate_kernel`: most programs for each multiprocessor. With few tiles a program, buffering stages only takes away the
#: shared memory that a second program needs: 14336 channels of 256 tokens 12.1 → 6.6 us on an H100, of 128 tokens 6.4 → 4.6.
ROTATE_WAVES = 2
#: For `dense_rotate_kernel`: from so many tiles a program on, loads are buffered, and the number is no constant: else the first
#: request of each length would wait for the compiler.
PIPELINED_FROM = 4


@lru_cache
def features(device: torch.device) -> dict[str, bool]:
    """Tell which features the device has, as arguments of the kernels.

    NATIVE: the kernels' assembly, which needs the bf16x2 instructions of compute capability 8.0. DEPENDENT: kernels that
    start before their predecessor has ended, which need 9.0. Triton's interpreter has neither.
    """
    if device.type != "cuda" or torch.version.hip:
        return {"NATIVE": False, "DEPENDENT": False}
    capability = torch.cuda.get_device_capability(device)
    return {"NATIVE": capability >= (8, 0), "DEPENDENT": capability >= (9, 0)}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def dependent(device: torch.device, wanted: bool = True) -> dict[str, bool]:
    """Return the launch options with which a kernel may start before its predecessor has ended, if that is wanted."""
    on = wanted and features(device)["DEPENDENT"]
    return {"DEPENDENT": True, "launch_pdl": True} if on else {"DEPENDENT": False}


def rotate_for(choice: Narrow | Wide, x: Tensor, weights: KernelWeights) -> Tensor:
    """Scale and rotate x [M, C] by all T transforms: [T, M, 128 KB] in x's dtype, with zeros beyond C.

    The channels are in the order in which the kernel of `choice` reads them (see `KernelLayout`). Where that is x itself,
    nothing is launched.
    """
    if weights.rotation.idle and isinstance(choice, Narrow) and x.shape[1] % 128 == 0 and x.is_contiguous():
        return x[None]
    overlap = overlaps(choice, weights.rotation.transforms)
    return rotate_padded(x, weights.rotation, isinstance(choice, Wide), overlap)


def rotate_padded(x: Tensor, rotation: RotationWeights, wide: bool, overlap: bool, activation: str = "") -> Tensor:
    """Scale and rotate x [M, C] by all T transforms: [T, M, 128 KB] in x's dtype, with zeros beyond C.

    wide: for kernels that read channels in `mma_order`; overlap: whether to let the next kernel start before this one has ended,
    and for the product with the dense R also whether to start before the kernel before has ended, which the rotation in K
    steps always does; activation: of `triton_rotate.load_input`, for x [M, 2 C], or "".
    """
    width = rotation.coefficients.shape[1] * 128
    out = torch.empty(rotation.transforms, x.shape[0], width, dtype=x.dtype, device=x.device)
    if wide and rotation.rotations and rotation.matrix is not None:
        _dense_rotate(x, rotation, rotation.matrix, out, overlap, activation)
    else:
        _givens(x, rotation, out, wide, overlap=overlap, activation=activation)
    return out


#: Up to so many tokens, what is then rounded is rotated in K steps, more by a product with the dense R.
ROUNDED_BY_STEPS = 8


def rotate_relative(x: Tensor, rotation: RotationWeights, activation: str = "") -> tuple[Tensor, Tensor]:
    """Scale and rotate x [M, C], and divide each block of 128 channels by its largest magnitude, so that it can be rounded.

    Returns float16 [T, M, 128 KB], zeros beyond C, the channels in their usual order, and the magnitudes, float32 [T, M, KB].
    activation: as for `rotate_padded`.
    """
    blocks = rotation.coefficients.shape[1]
    out = torch.empty(rotation.transforms, len(x), blocks * 128, dtype=torch.float16, device=x.device)
    peaks = torch.empty(rotation.transforms, len(x), blocks, dtype=torch.float32, device=x.device)
    if len(x) > ROUNDED_BY_STEPS and rotation.rotations and rotation.matrix is not None:
        _dense_rotate(x, rotation, rotation.matrix, out, True, activation, peaks)
    else:
        _givens(x, rotation, out, False, activation=activation, peaks=peaks)
    return out, peaks


def overlaps(choice: Narrow | Wide, transforms: int) -> bool:
    """Tell whether the product, and the rotation by the dense R, may start before their predecessors have ended.

    The rotation in K steps always does. With several transforms they may not: the rotation still keeps many multiprocessors
    busy when the programs of the product are distributed, so the product is distributed unevenly (18.1 instead of 10.3 us
    for q, k, v of an 8B model on an H100).
    """
    return transforms == 1 and (isinstance(choice, Wide) or choice.overlap)


def _givens(
    x: Tensor,
    rotation: RotationWeights,
    out: Tensor,
    mma_order: bool,
    identity: bool = False,
    overlap: bool = True,
    activation: str = "",
    peaks: Tensor | None = None,
) -> None:
    transforms, tokens, width = out.shape
    # With `identity` it runs as weights are prepared, and would read constants that the kernel before may still be writing.
    rows, early = givens_rows(tokens, x.device), dependent(x.device, not identity)
    blocks = rotation.coefficients.shape[1]
    start(
        givens_kernel,
        (blocks, cdiv(tokens, rows), transforms),
        (x, rotation.coefficients, rotation.partners, rotation.scales, out, out if peaks is None else peaks),
        (tokens, rotation.channels // 32, x.stride(0), blocks),
        K=rotation.rotations,
        TOKENS=rows,
        PADDED=width % 128 == 0,
        MMA_ORDER=mma_order,
        IDENTITY=identity,
        ACTIVATION=activation,
        PEAKS=peaks is not None,
        TRIGGER=early["DEPENDENT"] and overlap,
        num_warps=1,
        **early,
    )


def givens_rows(tokens: int, device: torch.device) -> int:
    """Return how many tokens a program rotates in K steps."""
    if not features(device)["NATIVE"]:
        return next_power_of_two(min(tokens, 128))  # few programs, as the interpreter is slow for each
    return 1 if tokens <= 16 else 4


def rotation_blocks(rotation: RotationWeights, channels: int, dtype: torch.dtype, mma_order: bool) -> Tensor:
    """Compute diag(1/a) R as dense blocks of 128 channels: [T, 128, channels]; the row is the input channel in its block.

    The launch overlaps neither with the kernel before, which may write what it reads, nor with the next one, because kernels
    read the matrix before they wait for their predecessor.
    """
    out = torch.empty(rotation.transforms, 128, channels, dtype=dtype, device=rotation.scales.device)
    _givens(out[0], rotation, out, mma_order, identity=True, overlap=False)
    return out


def with_matrix(weights: KernelWeights) -> KernelWeights:
    """Return the weights with their dense rotation matrix, which rotating many tokens and decoding need."""
    rotation = weights.rotation
    if rotation.transforms == 1 and not rotation.rotations and bool((rotation.scales == 1).all()):
        matrix = torch.empty(1, 128, 0, dtype=torch.float16, device=weights.words.device)
    else:
        matrix = rotation_blocks(rotation, weights.layout.k_blocks * 128, torch.float16, mma_order=True)
    return replace(weights, rotation=replace(rotation, matrix=matrix))


def _dense_rotate(
    x: Tensor,
    rotation: RotationWeights,
    matrix: Tensor,
    out: Tensor,
    overlap: bool,
    activation: str = "",
    peaks: Tensor | None = None,
) -> None:
    transforms, tokens, width = out.shape
    rows = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    blocks = width // 128 * transforms
    tiles = cdiv(cdiv(tokens, rows) * blocks, ROTATE_WAVES * multiprocessors(x.device))
    start(
        dense_rotate_kernel,
        (width // 128, cdiv(tokens, rows * tiles), transforms),
        (x, matrix, out, out if peaks is None else peaks),
        (tokens, rotation.channels // 32, x.stride(0), width // 128, tiles),
        TOKENS=rows,
        TILES=tiles if tiles < PIPELINED_FROM else 0,
        STAGES=1 if tiles < PIPELINED_FROM else 3,
        ACTIVATION=activation,
        PEAKS=peaks is not None,
        NATIVE=features(x.device)["NATIVE"],
        num_warps=4,
        **dependent(x.device, overlap),
    )


def linear(x: Tensor, weights: KernelWeights, bias: Tensor | None, choice: Product) -> Tensor:
    """Run the linears on x [M, C]: [M, sum of out_features] in x's dtype.

    bias: [sum of out_features] in x's dtype, or None; choice: the kernel and its tiles.
    """
    if isinstance(choice, Kept):
        assert weights.decoded is not None, "only kept weights are chosen"
        out = torch.empty(x.shape[0], len(weights.decoded), dtype=x.dtype, device=x.device)
        return _multiply(x, weights.decoded, bias, out)
    if isinstance(choice, Dense):
        return _dense(x, weights, bias, choice)
    return product(rotate_for(choice, x, weights), weights, bias, choice)


def product(
    x_rot: Tensor, weights: KernelWeights, bias: Tensor | None, choice: Narrow | Wide, squares: Tensor | None = None
) -> Tensor:
    """Multiply by the rotated weight, without rotating; x_rot: what `rotate_for` returns for the same choice.

    squares: None, or for a `Narrow` choice float32 [M, KB], by the root of whose sum each token is divided (`launch_norm`).
    """
    layout = weights.layout
    transforms, tokens, _ = x_rot.shape
    device = x_rot.device
    out = torch.empty(tokens, sum(weights.out_features), dtype=x_rot.dtype, device=device)
    tensors = (x_rot, weights.words, weights.grid, out if bias is None else bias, out)
    numbers = (tokens, layout.k_blocks, layout.padded_rows // 128, out.shape[1] // 8, *layout.segments)
    in_stage = (choice.rows, 0, choice.warps) if isinstance(choice, Narrow) else (choice.rows, choice.tokens, 1)
    options = {
        "BN": choice.rows,
        "STAGES": stages_for(choice.stages, weights.bits, *in_stage, device),
        "GROUPS": layout.groups_per_block,
        "SHARED": transforms == 1,
        "BITS": weights.bits,
        "HAS_BIAS": bias is not None,
        "NATIVE": features(device)["NATIVE"],
        "num_warps": choice.warps,
        **dependent(device, overlaps(choice, transforms)),
    }
    if isinstance(choice, Narrow):
        split = choice.split
        partial = out if split == 1 else scratch(device, split, tokens, layout.padded_rows)
        start(
            narrow_kernel,
            (layout.padded_rows // choice.rows, split, 1),
            (*tensors, out if squares is None else squares, partial, weights.arrivals),
            (*numbers, choice.prefetch),
            **options,
            NORM=0 if squares is None else next_power_of_two(layout.k_blocks),
            WARPS=choice.warps,
            BM=8 if tokens <= 8 else 16,
            ONE=tokens == 1,
            SPLIT=split > 1,
            EVEN=layout.k_blocks % (choice.warps * split) == 0,
        )
    else:
        tiles = layout.padded_rows // choice.rows * cdiv(tokens, choice.tokens)
        most = min(multiprocessors(device) * choice.waves, weights.arrivals.numel())
        programs = min(most, tiles * layout.k_blocks)
        partial = out if tiles % programs == 0 else scratch(device, programs, 2, choice.rows, choice.tokens)
        start(
            wide_kernel, (programs, 1, 1), (*tensors, partial, weights.arrivals), numbers, **options, BM=choice.tokens
        )
    return out


def stages_for(wanted: int, bits: int, rows: int, tokens: int, blocks: int, device: torch.device) -> int:
    """Return how many stages to buffer: those of the table, which was measured at 4 bits, or of wider codes as many as fit.

    rows, tokens: of a tile, no tokens where x does not go through shared memory; blocks: of 128 channels in a stage.
    """
    stage = 128 * blocks * (rows * bits // 8 + 2 * tokens)
    return wanted if bits <= 4 else max(1, min(wanted, int(0.88 * _shared_memory(device)) // stage))


@lru_cache
def _shared_memory(device: torch.device) -> int:
    """Return how many bytes of shared memory a program can have; in the interpreter, as on an H100."""
    if device.type != "cuda":
        return 232_448
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def scratch(device: torch.device, *shape: int) -> Tensor:
    """Allocate memory for partial sums."""
    return torch.empty(shape, dtype=torch.float32, device=device)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def decode(weights: KernelWeights, dtype: torch.dtype) -> Tensor:
    """Compute the dense weight of all linears, one below the other: [N, C] in the original basis, in this dtype."""
    out = torch.empty(sum(weights.out_features), weights.rotation.channels, dtype=dtype, device=weights.words.device)
    _decode_tiles(weights, _matrix(weights, dtype), 0, weights.layout.padded_rows // 128, out)
    return out


def _matrix(weights: KernelWeights, dtype: torch.dtype) -> Tensor:
    kind = torch.float32 if dtype == torch.float32 else torch.float16
    if kind == torch.float16 and weights.rotation.matrix is not None and not weights.rotation.idle:
        return weights.rotation.matrix
    return rotation_blocks(weights.rotation, weights.layout.k_blocks * 128, kind, mma_order=True)


def _decode_tiles(weights: KernelWeights, matrix: Tensor, first: int, last: int, out: Tensor) -> None:
    """Write the decoded rows of the tiles [first, last), each of 128 padded rows, into `out`."""
    layout = weights.layout
    shared = len(matrix) == 1
    rows = 64 if matrix.dtype == torch.float32 else DECODE_ROWS
    tiles = 128 // rows * (DECODE_TILES if shared else 1)
    start(
        decode_kernel,
        (layout.k_blocks, cdiv((last - first) * 128 // rows, tiles), 1),
        (weights.words, weights.grid, matrix, out),
        (first, last, layout.k_blocks, layout.padded_rows // 128, out.shape[1] // 32, *layout.segments),
        BN=rows,
        TILES=tiles,
        GROUPS=layout.groups_per_block,
        SHARED=shared,
        BITS=weights.bits,
        STAGES=DECODE_STAGES,
        NATIVE=features(out.device)["NATIVE"],
        num_warps=DECODE_WARPS,
    )


def _dense(x: Tensor, weights: KernelWeights, bias: Tensor | None, choice: Dense) -> Tensor:
    """Multiply chunk by chunk: decode some rows of the weight into a workspace, then multiply x by them."""
    layout = weights.layout
    matrix = _matrix(weights, x.dtype)
    out = torch.empty(x.shape[0], sum(weights.out_features), dtype=x.dtype, device=x.device)
    step = max(1, choice.rows // 128)
    workspace = torch.empty(min(step * 128, out.shape[1]), x.shape[1], dtype=x.dtype, device=x.device)
    column = 0
    for first in range(0, layout.padded_rows // 128, step):
        last = min(first + step, layout.padded_rows // 128)
        rows = layout.real_rows(first * 128, last * 128)
        weight = workspace[:rows]
        _decode_tiles(weights, matrix, first, last, weight)
        columns = slice(column, column + rows)
        _multiply(x, weight, bias if bias is None else bias[columns], out[:, columns])
        column += rows
    return out


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write x Wᵀ + bias into `out` and return it. Where the result is given, autocast does not change dtypes."""
    if bias is None:
        return torch.mm(x, weight.T, out=out)
    return torch.addmm(bias, x, weight.T, out=out)
