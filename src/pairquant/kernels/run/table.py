"""Choose the kernel and its tiles from a measured table, by device class, shape and number of tokens. Nothing is measured
while a model runs.

`pairquant tune` measures the shapes of a model on the user's GPU and writes the results into a file (`user_table`). They
are used together with the table below, and take precedence over it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from ...support.errors import ConfigError


@dataclass(frozen=True)
class Narrow:
    """Tiles of `narrow_kernel`.

    rows: per program; warps: per program, each sums its own part of the input channels; split: number of programs that
    share the input channels; stages: buffered blocks; overlap: whether rotation and product start before their
    predecessors have ended, which can distribute a large product unevenly over the multiprocessors; prefetch: how many
    blocks of 128 channels are then loaded into the cache while the kernel waits.
    """

    rows: int
    warps: int
    split: int = 1
    stages: int = 3
    overlap: bool = False
    prefetch: int = 0


@dataclass(frozen=True)
class Wide:
    """Tiles of `wide_kernel`.

    rows, tokens: per tile; warps: per program; stages: buffered blocks; waves: programs per multiprocessor.
    """

    rows: int
    tokens: int
    warps: int
    stages: int = 3
    waves: int = 1


@dataclass(frozen=True)
class Dense:
    """Decode the weight, `rows` rows at a time, into a workspace of rows × in_features, and multiply by that."""

    rows: int


@dataclass(frozen=True)
class Kept:
    """Multiply by the decoded weight, where it is kept (`decoded_budget`)."""


@dataclass(frozen=True)
class Bytes:
    """Tiles of `wide_bytes_kernel`, for activations that were rounded to 8 bits; as `Wide`."""

    rows: int
    tokens: int
    warps: int
    stages: int = 4
    waves: int = 2


@dataclass(frozen=True)
class WholeBytes:
    """Tiles of `whole_bytes_kernel`, one program for each: rows, half the tokens, warps, buffered stages."""

    rows: int = 128
    half: int = 128
    warps: int = 8
    stages: int = 4


@dataclass(frozen=True)
class RowBytes:
    """Decode the weight, `step` rows at a time, to 8 bits, and multiply by that; rows, tokens, warps, stages: as of `Wide`."""

    step: int = 16384
    rows: int = 128
    tokens: int = 256
    warps: int = 8
    stages: int = 4


Choice = Narrow | Wide | Dense
#: What multiplies activations that are not rounded.
Product = Choice | Kept
#: Of layers whose activations are rounded.
RoundedChoice = Narrow | Wide | Bytes | WholeBytes | RowBytes

#: Each entry is for a range of numbers of tokens; these are the largest of each range. For more tokens `DENSE` is used.
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512)
#: The workspace of 16384 rows takes 128 MiB for 4096 channels in 16 bits. Smaller workspaces were slower on an H100.
DENSE = Dense(16384)


#: From so many tokens on, a decoded weight that is kept (`decoded_budget`) is faster than its codes: the linears of an 8B block
#: with 128 tokens take 165 us on an H100, in 16 bits 178; with 256 tokens 267 and 207.
DECODED_FROM = 129


def _row(*choices: Choice) -> dict[int, Choice]:
    return dict(zip(TOKENS, choices, strict=True))


_N, _W = Narrow, Wide
#: Device class → (out_features, in_features) → choices by `TOKENS`. Measured on an H100, and changed after measurements on an
#: H200 if that made a shape at least 2 % faster (benchmarks/bench_kernels.py).
MEASURED: dict[str, dict[tuple[int, int], dict[int, Choice]]] = {
    "sm90": {
        (2048, 2048): _row(
            _N(16, 4, 1, 5, True, 8), _N(32, 4, 1, 4, True, 8), _W(64, 16, 4, 4, 1), _W(64, 32, 4, 4, 1), _W(64, 64, 4, 4, 1),
            _W(64, 128, 4, 3, 1), _W(64, 128, 4, 3, 1), _W(64, 128, 4, 3, 1),
        ),
        (4096, 2048): _row(
            _N(16, 4, 1, 5, True, 8), _N(32, 2, 1, 4, True, 8), _W(64, 16, 4, 4, 2), _W(64, 32, 4, 4, 1), _W(64, 64, 4, 4, 1),
            _W(64, 128, 4, 3, 1), _W(64, 128, 4, 3, 1), _W(128, 128, 8, 3, 1),
        ),
        (12288, 2048): _row(
            _N(32, 2, 1, 4, True), _N(32, 2, 1, 4), _W(64, 16, 4, 4, 3), _W(64, 32, 4, 4, 3), _W(64, 64, 4, 3, 3),
            _W(128, 128, 8, 3, 1), _W(128, 128, 8, 3, 1), _W(128, 256, 8, 3, 1),
        ),
        (2048, 6144): _row(
            _N(32, 2, 4, 4), _N(32, 2, 4, 4), _W(64, 16, 4, 4, 2), _W(64, 32, 4, 4, 1), _W(64, 64, 4, 4, 1),
            _W(64, 128, 4, 3, 2), _W(64, 128, 4, 3, 2), _W(128, 128, 8, 3, 1),
        ),
        (2560, 4096): _row(
            _N(16, 4, 1, 5, True, 8), _N(32, 4, 1, 4), _W(64, 16, 4, 3, 3), _W(64, 32, 4, 4, 3), _W(64, 64, 4, 4, 1),
            _W(64, 128, 4, 3, 2), _W(64, 128, 4, 3, 1), _W(128, 128, 8, 3, 1),
        ),
        (6144, 2560): _row(
            _N(32, 2, 1, 4, True), _N(32, 2, 1, 4), _W(64, 16, 4, 3, 4), _W(64, 32, 4, 4, 3), _W(64, 64, 4, 3, 3),
            _W(64, 128, 4, 3, 2), _W(64, 128, 4, 3, 2), _W(128, 128, 8, 3, 1),
        ),
        (19456, 2560): _row(
            _N(32, 2, 1, 4, True), _N(32, 2, 1, 4), _W(128, 16, 4, 4, 3), _W(128, 32, 4, 4, 2), _W(128, 64, 8, 4, 1),
            _W(128, 128, 8, 3, 1), _W(128, 256, 8, 3, 1), _W(128, 256, 8, 3, 1),
        ),
        (2560, 9728): _row(
            _N(32, 4, 4, 4), _N(32, 2, 4, 4), _W(64, 16, 4, 4, 3), _W(64, 32, 4, 4, 2), _W(64, 64, 4, 4, 2),
            _W(64, 128, 4, 3, 2), _W(128, 128, 8, 3, 1), _W(128, 128, 8, 3, 1),
        ),
        (4096, 4096): _row(
            _N(32, 4, 1, 4), _N(32, 4, 1, 4), _W(128, 16, 4, 4, 1), _W(64, 32, 4, 4, 2), _W(64, 64, 4, 4, 1),
            _W(64, 128, 4, 3, 2), _W(64, 128, 4, 3, 1), _W(64, 128, 4, 3, 2),
        ),
        (6144, 4096): _row(
            _N(32, 4, 1, 4, True), _N(32, 4, 2, 5, True), _W(64, 16, 4, 3, 3), _W(64, 32, 4, 4, 3), _W(64, 64, 4, 3, 3),
            _W(128, 128, 8, 3, 1), _W(128, 128, 8, 3, 1), _W(128, 128, 8, 3, 1),
        ),
        (28672, 4096): _row(
            _N(64, 2, 1, 4), _N(32, 2, 1, 4, True), _W(128, 16, 4, 4, 3), _W(128, 32, 4, 4, 2), _W(128, 64, 4, 3, 2),
            _W(128, 128, 8, 3, 1), _W(128, 256, 8, 3, 1), _W(128, 256, 8, 3, 1),
        ),
        (4096, 14336): _row(
            _N(32, 2, 4, 4), _N(32, 2, 4, 4), _W(128, 16, 4, 3, 2), _W(128, 32, 4, 4, 1), _W(128, 64, 8, 4, 1),
            _W(128, 128, 8, 3, 1), _W(128, 256, 8, 3, 1), _W(128, 256, 8, 3, 1),
        ),
    },
}  # fmt: skip
#: For device classes that were not measured: tiles that fit into 48 KiB of shared memory and do not need a Hopper GPU.
UNMEASURED = _row(
    _N(32, 2, 1, 3), _N(32, 2, 1, 3), _W(64, 16, 4, 3, 2), _W(64, 32, 4, 2, 2), _W(64, 32, 4, 2, 2),
    _W(64, 64, 4, 2, 1), _W(64, 64, 4, 2, 1), _W(64, 64, 4, 2, 1),
)  # fmt: skip


def choose(device_class: str, out_features: int, in_features: int, tokens: int) -> Choice:
    """Return the choice for this number of tokens, from the measured shape that is nearest by the logarithms of its sides."""
    return _choices(device_class, out_features, in_features).get(_range_of(tokens), DENSE)


#: Device class → tiles for products of 8 bits, each for up to so many tokens. Measured on an H100 with int8 and fp8
#: (benchmarks/bench_activation_kernels.py). Device classes that are not here multiply in 16 bits.
BYTES: dict[str, tuple[tuple[float, Bytes], ...]] = {
    "sm90": ((16, Bytes(64, 16, 4)), (32, Bytes(64, 32, 4)), (64, Bytes(64, 64, 4)), (math.inf, Bytes(64, 128, 4))),
    "interpreter": ((math.inf, Bytes(64, 16, 4, 2)),),
}
#: Fewer tokens are multiplied in 16 bits.
BYTES_FROM = 9
#: From so many tiles on, `WholeBytes` keep the multiprocessors of an H100 busy, and are faster: 6144 rows and 512 tokens, 96
#: tiles, 38.9 us instead of 41.7; 4096 rows and 512 tokens, 64 tiles, 37.3 us instead of 22.0.
WHOLE_TILES = 96
#: From so many tokens on the weight is rounded to 8 bits, which pays: 14336 + 14336 rows of 4096 channels take 431 us (int8
#: 476) instead of 527 (625) for 2048 tokens, and 170 (189) instead of 153 (161) for 512; nothing between was measured. It
#: adds 0.7 % to the squared error of a 4-bit weight for int8, and 7 % for fp8. Layers for which it adds much more are spared.
ROW_BYTES_FROM = {"int8": 1024, "fp8": 1024}
#: For many tokens in 16 bits, where the table says that decoding the weight is faster.
MANY_TOKENS = Wide(64, 64, 4, 2, 1)


def eight_bits(device_class: str, activations: str, bits: int, floating: bool = False) -> bool:
    """Tell whether activations of this format and weights of so many bits are multiplied as 8-bit numbers.

    Wider weights are not: float8_e4m3 holds whole numbers up to 16 only. Nor are floats, for which there is no such kernel.
    """
    return device_class in BYTES and activations in ("int8", "fp8") and bits <= 4 and not floating


def choose_rounded(
    device_class: str,
    out_features: int,
    in_features: int,
    tokens: int,
    activations: str,
    bits: int,
    by_row: bool = True,
    floating: bool = False,
) -> RoundedChoice:
    """Return the choice for a layer whose activations are rounded to a format of `spec.activations`.

    bits: of its weight; by_row: whether its weight may be rounded to 8 bits with one scale for each row (`row_scales`);
    floating: whether its weight's codes are floats.
    """
    if eight_bits(device_class, activations, bits, floating) and tokens >= BYTES_FROM:
        if device_class == "sm90" and tokens >= ROW_BYTES_FROM[activations] and by_row:
            return RowBytes()
        if device_class == "sm90" and -(-out_features // 128) * -(-tokens // 256) >= WHOLE_TILES and tokens > 128:
            return WholeBytes()
        return next(choice for most, choice in BYTES[device_class] if tokens <= most)
    # The weight is not decoded for many tokens: that would undo its rotation, and the activations are rounded in it.
    choice = choose(device_class, out_features, in_features, min(tokens, TOKENS[-1]))
    return MANY_TOKENS if isinstance(choice, Dense) else choice


def _range_of(tokens: int) -> int:
    return next((end for end in TOKENS if tokens <= end), 0)


@lru_cache(maxsize=4096)
def _choices(device_class: str, out_features: int, in_features: int) -> Mapping[int, Choice]:
    measured = {**MEASURED.get(device_class, {}), **user_table(device_class)}
    if not measured:
        return UNMEASURED

    def distance(shape: tuple[int, int]) -> float:
        return math.hypot(math.log(shape[0] / out_features), math.log(shape[1] / in_features))

    return {**UNMEASURED, **measured[min(measured, key=distance)]}


def user_path(device_class: str) -> Path:
    """Return the file in which `pairquant tune` keeps its measurements for this device class."""
    return Path.home() / ".cache" / "pairquant" / f"kernels-{device_class}.json"


@lru_cache
def user_table(device_class: str) -> dict[tuple[int, int], dict[int, Choice]]:
    """Read the user's own measurements; empty if there are none. Raises `ConfigError` if the file is not such a table."""
    path = user_path(device_class)
    if not path.is_file():
        return {}
    kinds = {"narrow": Narrow, "wide": Wide, "dense": Dense}
    try:
        return {
            (entry["out_features"], entry["in_features"]): {
                int(tokens): kinds[choice.pop("kernel")](**choice) for tokens, choice in entry["choices"].items()
            }
            for entry in json.loads(path.read_text())
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not a table of kernel choices ({error!r}). Delete it, or run `pairquant tune` again."
        ) from None


def save_user_table(device_class: str, table: Mapping[tuple[int, int], Mapping[int, Choice]]) -> Path:
    """Add `table` to the user's measurements and return their file.

    The file is written under another name and then renamed, so that it is never incomplete.
    """
    merged = {**user_table(device_class), **table}
    entries = [
        {
            "out_features": n,
            "in_features": c,
            "choices": {
                str(t): {"kernel": type(choice).__name__.lower(), **asdict(choice)} for t, choice in row.items()
            },
        }
        for (n, c), row in sorted(merged.items())
    ]
    path = user_path(device_class)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".partial")
    staged.write_text(json.dumps(entries, indent=1))
    staged.replace(path)
    user_table.cache_clear()
    _choices.cache_clear()
    return path
