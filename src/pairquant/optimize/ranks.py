"""Several processes at one model (torchrun): calibration windows, the rows of every linear, and linears are spread.

Every rank sees its own windows; second moments are summed over all. To fit, every rank has its own rows of each weight:
the proxy is a sum over rows, so gradients of a transform are summed. To round, it has linears of its own, whole: there
the columns come one after another, and fewer rows are hardly quicker. What is packed then goes to everyone. A single
process is the case of one rank, without `torch.distributed`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..spec.linear import LinearLayout, PackedLinear


@dataclass(frozen=True)
class Ranks:
    """This process's place among `size`."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def windows(self, tokens: Tensor) -> Tensor:
        """This rank's share of the calibration windows [samples, T]: every `size`-th."""
        return tokens[self.rank :: self.size]

    def rows(self, count: int, unit: int, rank: int | None = None) -> slice:
        """Return the share of this (or another) rank of `count` rows, in whole units; may be empty when there are few."""
        rank, units = self.rank if rank is None else rank, count // unit
        return slice(units * rank // self.size * unit, units * (rank + 1) // self.size * unit)

    def add(self, tensor: Tensor) -> None:
        """Sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def largest(self, tensor: Tensor) -> None:
        """Replace values by the largest of all ranks', in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)

    def average(self, tensors: Sequence[Tensor | None]) -> None:
        """Replace values by their mean over all ranks, in place."""
        for tensor in tensors:
            if self.size > 1 and tensor is not None:
                dist.all_reduce(tensor)
                tensor /= self.size

    def mean(self, value: float, device: torch.device) -> float:
        """Return mean over all ranks."""
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=device)
        self.average([total])
        return total.item()

    def same(self, tensors: Sequence[Tensor]) -> None:
        """Replace values by the first rank's, in place."""
        for tensor in tensors:
            self._broadcast(tensor, 0)

    def dealt(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Return a rank for each piece of work by name: the dearest first, to whoever has least to do."""
        load = [0.0] * self.size
        owners = {}
        for name in sorted(costs, key=lambda name: -costs[name]):
            owners[name] = min(range(self.size), key=load.__getitem__)
            load[owners[name]] += costs[name]
        return owners

    def collected(self, part: Tensor, count: int, unit: int, owner: int) -> Tensor | None:
        """Return every rank's `rows` of a matrix with `count` of them, put together at its owner; None elsewhere."""
        if self.size == 1:
            return part
        parts = []
        for rank in range(self.size):
            rows = self.rows(count, unit, rank)
            received = part.contiguous() if rank == self.rank else part.new_empty(rows.stop - rows.start, part.shape[1])
            self._broadcast(received, rank)
            parts.append(received if owner == self.rank else None)
        return torch.cat([p for p in parts if p is not None]) if owner == self.rank else None

    def shared(
        self, packed: PackedLinear | None, layout: LinearLayout, owner: int, device: torch.device
    ) -> PackedLinear:
        """Return a linear of this layout that its owner has, everywhere; None from the others."""
        if self.size == 1:
            assert packed is not None, "a single rank has everything"
            return packed
        received: dict[str, Tensor] = {}
        for name, field in layout.fields().items():
            own = packed[name].to(device).contiguous() if packed is not None else None
            received[name] = torch.empty(field.shape, dtype=field.dtype, device=device) if own is None else own
            self._broadcast(received[name], owner)
        return PackedLinear(layout, received)

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        if self.size > 1 and tensor.numel():
            dist.broadcast(tensor.view(torch.uint8), source)  # as bytes: NCCL knows no 16-bit integers

    def wait(self) -> None:
        """Wait until all ranks have called this."""
        if self.size > 1:
            dist.barrier()


#: One process.
ALONE = Ranks()


def processes() -> int:
    """Return how many processes torchrun started; 1 for one that it did not start."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Connect the ranks that torchrun started; a process that it did not start is alone."""
    size = processes()
    if size == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
