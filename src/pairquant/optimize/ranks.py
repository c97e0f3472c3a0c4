"""Several processes at one model (torchrun): calibration windows and the rows of every linear are spread over them.

Every rank sees its own windows; second moments are summed over all. Every rank has its own rows of each weight: the
proxy is a sum over rows, so gradients of a transform are summed, and rounding goes row by row. The packed parts then go
to everyone. A single process is the case of one rank, without `torch.distributed`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout import LinearLayout, PackedLinear, columns_per_block


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
        """The share of this (or another) rank of `count` rows, in whole units; may be empty when there are few."""
        rank, units = self.rank if rank is None else rank, count // unit
        return slice(units * rank // self.size * unit, units * (rank + 1) // self.size * unit)

    def add(self, tensor: Tensor) -> None:
        """Sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def average(self, tensors: Sequence[Tensor | None]) -> None:
        """Mean over all ranks, in place."""
        for tensor in tensors:
            if self.size > 1 and tensor is not None:
                dist.all_reduce(tensor)
                tensor /= self.size

    def mean(self, value: float, device: torch.device) -> float:
        """Mean over all ranks."""
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=device)
        self.average([total])
        return total.item()

    def same(self, tensors: Sequence[Tensor]) -> None:
        """The first rank's values everywhere, in place."""
        for tensor in tensors:
            self._broadcast(tensor, 0)

    def whole(self, part: PackedLinear | None, layout: LinearLayout, device: torch.device) -> PackedLinear:
        """A linear of this layout from every rank's `rows` of it, everywhere; None from a rank that has no rows."""
        if self.size == 1:
            assert part is not None, "a single rank has all rows"
            return part
        parts = []
        for rank in range(self.size):
            rows = self.rows(layout.out_features, columns_per_block(layout.bits), rank)
            if count := rows.stop - rows.start:
                own = part.tensors() if part is not None and rank == self.rank else {}
                parts.append(self._received(own, replace(layout, out_features=count), rank, device))
        return PackedLinear.joined(parts)

    def _received(
        self, own: dict[str, Tensor], layout: LinearLayout, source: int, device: torch.device
    ) -> PackedLinear:
        """The linear that `source` has; `own`: its tensors by name there, {} elsewhere."""
        received = {}
        for name, field in layout.fields().items():
            empty = torch.empty(field.shape, dtype=field.dtype, device=device)
            received[name] = own[name].to(device).contiguous() if own else empty
            self._broadcast(received[name], source)
        return PackedLinear(layout, **received)

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        if self.size > 1 and tensor.numel():
            dist.broadcast(tensor.view(torch.uint8), source)  # as bytes: NCCL knows no 16-bit integers

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()


#: One process.
ALONE = Ranks()


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun started, connected; alone, if it did not start this process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
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
