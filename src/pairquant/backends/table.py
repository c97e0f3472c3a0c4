"""The backends in order of preference, and the choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..spec.linear import LinearLayout, PackedLinear
from .base import Backend, Prepared
from .cpu_int4 import CpuInt4
from .dense import Dense
from .triton_int4 import TritonInt4

#: The first that takes a layer runs it; the last takes all. A new kernel is a row here and a file of its own.
BACKENDS: tuple[Backend, ...] = (TritonInt4(), CpuInt4(), Dense())
BY_NAME = {backend.name: backend for backend in BACKENDS}
DENSE = BACKENDS[-1]


def choose(layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> Backend:
    """Return who runs a layer on activations of this dtype."""
    for backend in BACKENDS:
        if backend.refusal(layout, device, dtype) is None:
            return backend
    raise AssertionError("the last backend takes every layer")


@dataclass(frozen=True)
class Explanation:
    """Who runs a layer, and why those that would be preferred do not. refusals: name → reason."""

    backend: str
    refusals: dict[str, str]


def explain(layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> Explanation:
    """Return what `choose` does, with the reasons why the backends before it in the list refuse the layer."""
    chosen = choose(layout, device, dtype)
    before = BACKENDS[: BACKENDS.index(chosen)]
    return Explanation(chosen.name, {b.name: b.refusal(layout, device, dtype) or "" for b in before})


def prepare_all(linears: Sequence[PackedLinear], dtype: torch.dtype) -> list[Prepared]:
    """Return linears that read the same input, ready to run in as few steps as their backend allows.

    They must lie on one device and agree in their specs. dtype: of the activations.
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
