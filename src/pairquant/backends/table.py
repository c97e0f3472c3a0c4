"""The list of backends in order of preference, and the functions that choose from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..spec.linear import LinearLayout, PackedLinear
from .base import Backend, Prepared
from .cpu_int4 import CpuInt4
from .dense import Dense
from .triton_kernels import TritonKernels

#: A layer is run by the first backend that accepts it; the last one accepts every layer. A new backend needs an entry here
#: and a file in this folder.
BACKENDS: tuple[Backend, ...] = (TritonKernels(), CpuInt4(), Dense())
BY_NAME = {backend.name: backend for backend in BACKENDS}
DENSE = BACKENDS[-1]


def choose(layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> Backend:
    """Return the backend that runs a layer on this device; dtype: that of the activations."""
    for backend in BACKENDS:
        if backend.refusal(layout, device, dtype) is None:
            return backend
    raise AssertionError("the last backend takes every layer")


@dataclass(frozen=True)
class Explanation:
    """The backend that runs a layer, and why those before it in the list do not. refusals: name → reason."""

    backend: str
    refusals: dict[str, str]


def explain(layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> Explanation:
    """Return the name of the backend that `choose` returns, and the reasons of the backends before it in the list."""
    chosen = choose(layout, device, dtype)
    before = BACKENDS[: BACKENDS.index(chosen)]
    return Explanation(chosen.name, {b.name: b.refusal(layout, device, dtype) or "" for b in before})


def prepare_all(linears: Sequence[PackedLinear], dtype: torch.dtype) -> list[Prepared]:
    """Prepare linears that read the same input, to run in as few steps as their backend allows.

    They must be on the same device and have equal specs. dtype: that of the activations.
    """
    device = linears[0]["scales"].device
    for backend in BACKENDS:
        batches = backend.batches(linears)
        if not any(backend.refusal(_joined_layout(batch), device, dtype) for batch in batches):
            break
    return [
        Prepared(backend.name, backend.prepare(batch, dtype), _sizes(backend, batch), batch[0].layout.group_size)
        for batch in batches
    ]


def _joined_layout(batch: Sequence[PackedLinear]) -> LinearLayout:
    return replace(batch[0].layout, out_features=sum(linear.layout.out_features for linear in batch))


def _sizes(backend: Backend, batch: Sequence[PackedLinear]) -> tuple[int, ...]:
    return tuple(linear.layout.out_features for linear in batch)
