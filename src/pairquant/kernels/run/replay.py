"""Run a function of a few rows by CUDA graphs: one launch from the host instead of many.

For what engines run outside the graphs that they capture themselves, as vLLM does with the output embedding: there the
host's time to launch our kernels is part of every decoded token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: A graph is captured for each of these numbers of rows, when it is first needed; fewer rows are filled up.
SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    given: Tensor
    returned: Tensor


class Replayed:
    """A function from x [M, C] to [M, N] that computes each row for itself, and the graphs that stand for it.

    More rows than the largest of `SIZES`, other devices, and calls within another capture run the function itself.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function
        self.graphs: dict[tuple[int, torch.dtype], _Graph] = {}

    def __call__(self, x: Tensor) -> Tensor:
        size = size_for(len(x))
        if size is None or not x.is_cuda or torch.cuda.is_current_stream_capturing():
            return self.function(x)
        key = size, x.dtype
        if key not in self.graphs:
            self.graphs[key] = self._captured(size, x)
        found = self.graphs[key]
        found.given[: len(x)].copy_(x)
        found.graph.replay()
        return found.returned[: len(x)].clone()  # the next replay writes there again

    def _captured(self, size: int, x: Tensor) -> _Graph:
        given, graph = x.new_zeros(size, x.shape[1]), torch.cuda.CUDAGraph()
        self.function(given)  # compiles the kernels, which a capture may not
        torch.cuda.synchronize(x.device)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            returned = self.function(given)
        return _Graph(graph, given, returned)


def size_for(rows: int) -> int | None:
    """Return the rows of the graph for so many rows; None where there is none."""
    return next((size for size in SIZES if 0 < rows <= size), None)
