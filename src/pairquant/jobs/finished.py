"""The blocks that a run has finished, as its journal keeps them and the walk asks for them."""

from __future__ import annotations

from torch import Tensor

from ..checkpoint.journal import Journal
from ..optimize.finished import BlockResult


class Finished:
    """The journal, as the walk asks for it."""

    def __init__(self, journal: Journal):
        self.journal = journal
        self.count = journal.count  # those of earlier runs

    def result(self, index: int) -> BlockResult:
        entry = self.journal.entries[index]
        packed, parameters = self.journal.packed(index)
        shared = [tuple(group) for group in entry["shared"]]
        return BlockResult(index, entry["path"], packed, entry["errors"], shared, parameters=parameters)

    def snapshot(self) -> tuple[int, dict[str, Tensor]] | None:
        return self.journal.streams()
