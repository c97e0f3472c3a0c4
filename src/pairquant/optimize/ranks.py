"""Several processes at one model (torchrun): calibration windows and linears are spread over them.

Every rank sees its own windows; second moments are summed over all; each transform is fitted, and its linears rounded,
by one rank, which hands the packed result to the others. A single process is the case of one rank, without
`torch.distributed`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout import LinearLayout, PackedLinear


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

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Which rank does each piece of work: the dearest first, to the rank that has least so far."""
        load, owners = [0.0] * self.size, [0] * len(costs)
        for piece in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[piece] = min(range(self.size), key=load.__getitem__)
            load[owners[piece]] += costs[piece]
        return owners

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

    def hand_out(
        self, packed: PackedLinear | None, error: float, layout: LinearLayout, owner: int, device: torch.device
    ) -> tuple[PackedLinear, float]:
        """The owner's linear and its error, everywhere; the others pass None."""
        if self.size == 1:
            assert packed is not None, "a single rank owns everything"
            return packed, error
        tensors = packed.tensors() if packed is not None else {}
        received = {}
        for name, field in layout.fields().items():
            tensor = tensors[name].to(device) if tensors else torch.empty(field.shape, dtype=field.dtype, device=device)
            if tensor.numel():
                dist.broadcast(tensor.view(torch.uint8), owner)  # as bytes: NCCL knows no 16-bit integers
            received[name] = tensor
        value = torch.tensor([error], dtype=torch.float64, device=device)
        dist.broadcast(value, owner)
        return PackedLinear(layout, **received), value.item()

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()


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
