"""What a report shows, as plain data: of each checkpoint its linears, its run and a close-up of one weight, and what was
measured (`results`). Everything about weights comes from `core`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.original import Original
from ..checkpoint.read import Checkpoint, ModelFiles
from ..core.linear import Transform, rotated_weight, transform_of
from ..spec.linear import LinearLayout, PackedLinear
from ..support.errors import ConfigError
from ..support.formatting import block_and_rest, distinct_ends, short_name
from .log import BlockRecord, read_log
from .results import Measured, read

#: Output rows, evenly spaced, over which channels of every linear are measured; the close-up takes all.
SAMPLED_ROWS = 256
#: Most points of the close-up's scatter.
POINTS = 1000
BINS = 60


@dataclass(frozen=True)
class LinearFacts:
    """One quantized linear.

    block: its number, "" outside the blocks; kind: "q", "up", …; error: relative error of its output on the calibration
    text, None if not recorded; outliers_*, range_*: `outlier_ratio` and `group_range` of the weight in its own basis
    and in the rotated one; largest_angle: in radians, 0 without rotations.
    """

    path: str
    block: str
    kind: str
    layout: LinearLayout
    error: float | None
    outliers_before: float
    outliers_after: float
    range_before: float
    range_after: float
    largest_angle: float


@dataclass(frozen=True)
class CloseUp:
    """One linear's weight before and after its transform.

    magnitude_*: mean |w| of each input channel, float32 [C]; pair: the two channels, turned together, whose magnitudes
    differ most, None without rotations; points_*: their weights in up to `POINTS` rows, float32 [P, 2].
    exact: the weight is the original's; else the decoded one, which rounding has changed.
    """

    path: str
    exact: bool
    magnitude_before: Tensor
    magnitude_after: Tensor
    pair: tuple[int, int] | None
    points_before: Tensor
    points_after: Tensor


@dataclass(frozen=True)
class Histogram:
    """centers: of the bins, float32 [B]; shares: kind of linear → part of its values in each bin, float32 [B]."""

    centers: Tensor
    shares: dict[str, Tensor]


@dataclass(frozen=True)
class CheckpointFacts:
    """size_16_bit: bytes that the same tensors take with 16 bits a number; remark: whether the original was there.

    angles, scales: of all linears, by kind, angles in radians and scales as log2 of a, by which a weight's channels are
    multiplied; angles is None without rotations.
    """

    name: str
    checkpoint: Checkpoint
    size: int
    size_16_bit: int
    linears: list[LinearFacts]
    blocks: list[BlockRecord]
    close_up: CloseUp
    angles: Histogram | None
    scales: Histogram
    remark: str
    measured: Measured


@dataclass(frozen=True)
class ReportFacts:
    checkpoints: list[CheckpointFacts]
    measured: Measured

    @property
    def models(self) -> list[str]:
        """Every model's name, the checkpoints' first: the order of their colours."""
        return list(dict.fromkeys([*(each.name for each in self.checkpoints), *self.measured.names()]))


def gather(
    models: Sequence[str | Path],
    results: Iterable[Path] = (),
    linear: str | None = None,
    on_linears: Callable[[str, int], Callable[[], None]] | None = None,
) -> ReportFacts:
    """Read everything that is to be shown.

    linear: the close-up's, by default each checkpoint's with the largest outlier ratio. `on_linears(name, count)` is
    told what is coming and returns what to call after each linear. Raises `CheckpointError` for a damaged checkpoint or
    one without that linear, `ConfigError` for results of something else or a checkpoint given twice.
    """
    files = [ModelFiles.find(str(model)) for model in models]
    opened = [Checkpoint.open(file) for file in files]
    names = labels([file.directory for file in files])
    measured = read(results, dict(zip(names, files, strict=True)))
    if linear is not None:
        for checkpoint in opened:
            checkpoint.layout(linear)
    found = []
    for name, file, checkpoint in zip(names, files, opened, strict=True):
        advance = on_linears(name, len(checkpoint.stored.linears())) if on_linears else None
        found.append(_checkpoint_facts(name, checkpoint, file.size_bytes(), linear, measured.of(name), advance))
    return ReportFacts(found, measured)


def labels(directories: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell the directories apart."""
    paths = [directory.resolve() for directory in directories]
    if len(set(paths)) < len(paths):
        twice = next(str(directories[i]) for i, path in enumerate(paths) if path in paths[:i])
        raise ConfigError(f"checkpoint {twice!r} is given twice: name each once")
    return distinct_ends(paths)


def outlier_ratio(magnitude: Tensor) -> float:
    """Return the largest channel's magnitude over the median's, for magnitudes [C]."""
    return (magnitude.max() / magnitude.median().clamp(min=torch.finfo(magnitude.dtype).tiny)).item()


def group_range(weight: Tensor, group_size: int) -> float:
    """(max - min) / rms of the quantizer's groups, averaged, for a weight [N, C]: its steps' size is proportional to it."""
    groups = weight.unflatten(1, (-1, group_size))
    rms = groups.square().mean(-1).sqrt().clamp(min=torch.finfo(weight.dtype).tiny)
    return ((groups.amax(-1) - groups.amin(-1)) / rms).mean().item()


def magnitudes(weight: Tensor) -> Tensor:
    """Return mean |w| of each input channel: [C] of a weight [N, C]."""
    return weight.abs().mean(0)


def _checkpoint_facts(
    name: str,
    checkpoint: Checkpoint,
    size: int,
    linear: str | None,
    measured: Measured,
    advance: Callable[[], None] | None,
) -> CheckpointFacts:
    blocks, original = read_log(checkpoint.directory), Original(checkpoint)
    linears: list[LinearFacts] = []
    angles: dict[str, list[Tensor]] = {}
    scales: dict[str, list[Tensor]] = {}
    for path in _in_order(checkpoint):
        packed = checkpoint.packed(path)
        linears.append(_linear_facts(checkpoint, path, packed, original.weight(path)))
        if packed.layout.rotations:
            angles.setdefault(linears[-1].kind, []).append(packed["theta"].float().flatten())
        scales.setdefault(linears[-1].kind, []).append(-packed["channel_scales"].float().abs().log2().flatten())
        if advance:
            advance()
    chosen = linear or max(linears, key=lambda facts: facts.outliers_before).path
    return CheckpointFacts(
        name,
        checkpoint,
        size,
        _size_16_bit(checkpoint),
        linears,
        blocks,
        _close_up(chosen, checkpoint.packed(chosen), original.weight(chosen)),
        _histogram(angles) if angles else None,
        _histogram(scales),
        original.remark,
        measured,
    )


def _in_order(checkpoint: Checkpoint) -> list[str]:
    """Return the linears' paths, by block and as they were quantized."""
    rank = {path: place for place, path in enumerate(checkpoint.report.get("linears", {}))}

    def key(path: str) -> tuple[int, int]:
        block, _ = block_and_rest(path)
        return int(block or -1), rank.get(path, len(rank))

    return sorted(checkpoint.stored.linears(), key=key)


def _linear_facts(checkpoint: Checkpoint, path: str, packed: PackedLinear, weight: Tensor | None) -> LinearFacts:
    block, rest = block_and_rest(path)
    transform = transform_of(packed)
    before, after = _before_and_after(packed, transform, weight, SAMPLED_ROWS)
    return LinearFacts(
        path,
        block,
        short_name(rest),
        packed.layout,
        checkpoint.report.get("linears", {}).get(path, {}).get("error"),
        outlier_ratio(magnitudes(before)),
        outlier_ratio(magnitudes(after)),
        group_range(before, packed.layout.group_size),
        group_range(after, packed.layout.group_size),
        transform.theta.abs().max().item() if transform.theta.numel() else 0.0,
    )


def _before_and_after(
    packed: PackedLinear, transform: Transform, weight: Tensor | None, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return a weight in its own basis and in the rotated one: float32 [N, C] both, or about `rows` of the N.

    weight: the original's; without it, what is stored stands for both.
    """
    if weight is not None:
        before = _spaced(weight, rows)
        return before, transform.weight_in(before)
    after = rotated_weight(packed if rows is None else packed.thinned(_step(packed.layout.out_features, rows)))
    return transform.weight_out(after), after


def _spaced(rows: Tensor, most: int | None) -> Tensor:
    """Return at most about `most` of the rows, evenly spaced."""
    return rows if most is None else rows[:: _step(len(rows), most)]


def _step(count: int, most: int) -> int:
    return -(-count // most)


def _close_up(path: str, packed: PackedLinear, weight: Tensor | None) -> CloseUp:
    transform = transform_of(packed)
    before, after = _before_and_after(packed, transform, weight)
    magnitude = magnitudes(before)
    pair = _most_unequal_pair(packed, magnitude)
    columns = list(pair) if pair else [0, 0]
    points_before, points_after = (_spaced(w[:, columns], POINTS) for w in (before, after))
    return CloseUp(
        path, weight is not None, magnitude, magnitudes(after), pair, points_before.contiguous(), points_after.contiguous()
    )  # fmt: skip


def _most_unequal_pair(packed: PackedLinear, magnitude: Tensor) -> tuple[int, int] | None:
    """Return the two channels, among the pairs of all rotations, whose magnitudes [C] differ most."""
    if packed.layout.rotations == 0:
        return None
    g = packed.layout.group_size
    start = torch.arange(0, packed.layout.in_features, g).repeat_interleave(g)
    pairs = (packed["pairs"].long() + start).view(-1, 2)
    i, j = pairs[(magnitude[pairs[:, 0]] - magnitude[pairs[:, 1]]).abs().argmax()].tolist()
    return i, j


def _histogram(values: dict[str, list[Tensor]]) -> Histogram:
    """Count values in bins of a range, symmetric around 0, that holds them all."""
    joined = {kind: torch.cat(parts) for kind, parts in values.items()}
    end = max(max(part.abs().max().item() for part in joined.values()), 1e-3)
    edges = torch.linspace(-end, end, BINS + 1)
    shares = {kind: torch.histc(part, BINS, -end, end) / len(part) for kind, part in joined.items()}
    return Histogram((edges[1:] + edges[:-1]) / 2, shares)


def _size_16_bit(checkpoint: Checkpoint) -> int:
    """Return bytes of the model with two bytes a number."""
    layouts = [checkpoint.layout(path) for path in checkpoint.stored.linears()]
    packed = {name for name in checkpoint.stored.packed_names() if not name.endswith(".bias")}
    plain = sum(
        torch.Size(field.shape).numel() for name, field in checkpoint.stored.fields.items() if name not in packed
    )
    return 2 * (plain + sum(layout.in_features * layout.out_features for layout in layouts))
