"""What is known of a finished block, and of the blocks that an earlier run finished."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ..spec.linear import PackedLinear


@dataclass
class BlockResult:
    """One finished block. packed and errors by linear path; errors are relative output errors (`proxy_error`).

    shared: groups of linears with one transform; tokens: how many each expert got, by the home of the experts; uncalled:
    linears that no forward pass runs, left plain; parameters: other parameters of the block that were trained, by path;
    history: what block-wise training reported; gpu_peak: most GPU memory allocated so far, bytes.
    """

    index: int
    path: str
    packed: dict[str, PackedLinear] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    shared: list[tuple[str, ...]] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    uncalled: list[str] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    gpu_peak: int = 0


class Finished(Protocol):
    """What an earlier run left: results of the first `count` blocks, and perhaps the streams entering a later one."""

    @property
    def count(self) -> int: ...
    def result(self, index: int) -> BlockResult: ...
    def snapshot(self) -> tuple[int, dict[str, Tensor]] | None: ...


class Nothing:
    """No earlier run."""

    count = 0

    def result(self, index: int) -> BlockResult:
        raise IndexError(index)

    def snapshot(self) -> None:
        return None
