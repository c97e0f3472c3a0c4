"""The list of backends in order of preference, and the functions that choose from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..kernels.run.decoded_budget import VARIABLES, budget
from ..spec.linear import LinearLayout, PackedLinear
from .base import Backend, Prepared
from .cpu_int4 import CpuInt4
from .cpu_int8 import CpuInt8
from .dense import Dense
from .triton_kernels import TritonKernels

#: A layer is run by the first backend that accepts it; the last one accepts every layer. A new backend needs an entry here
#: and a file in this folder.
BACKENDS: tuple[Backend, ...] = (TritonKernels(), CpuInt8(), CpuInt4(), Dense())
BY_NAME = {backend.name: backend for backend in BACKENDS}
DENSE = BACKENDS[-1]


def check_settings(device: torch.device) -> None:
    """Raise `ConfigError` if the environment gives backends of this device a setting that is not allowed.

    It is checked for layers that do not need it, too: else a mistake would be ignored, or found hours later.
    """
    if device.type in VARIABLES and not torch.compiler.is_compiling():
        budget(device.type)


def choose(layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> Backend:
    """Return the backend that runs a layer on this device; dtype: that of the activations. Raises as `check_settings`."""
    check_settings(device)
    for backend in BACKENDS:
        if backend.refusal(layout, device, dtype) is None:
            return backend
    raise AssertionError("the last backend takes every layer")


@dataclass(frozen=True)
class Explanation:
    """The backend that runs a layer, and why those before it in the list do not. refusals: name → reason.

    simulated: the format of activations that are rounded, but multiplied in 16 or 32 bits; None where there is none.
    """

    backend: str
    refusals: dict[str, str]
    simulated: str | None = None

    @property
    def label(self) -> str:
        """The backend's name for users, which says so where the format of the activations is only simulated."""
        return f"{self.backend} ({self.simulated} activations simulated)" if self.simulated else self.backend


def explain(layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> Explanation:
    """Return the name of the backend that `choose` returns, and the reasons of the backends before it in the list."""
    chosen = choose(layout, device, dtype)
    before = BACKENDS[: BACKENDS.index(chosen)]
    simulated = layout.activations if chosen.simulates(layout, device) else None
    return Explanation(chosen.name, {b.name: b.refusal(layout, device, dtype) or "" for b in before}, simulated)


def prepare_all(linears: Sequence[PackedLinear], dtype: torch.dtype) -> list[Prepared]:
    """Prepare linears that read the same input, to run in as few steps as their backend allows.

    They must be on the same device and have equal specs. dtype: that of the activations. Raises as `check_settings`.
    """
    device = linears[0]["scales"].device
    check_settings(device)
    for backend in BACKENDS:
        batches = backend.batches(linears)
        if not any(backend.refusal(_joined_layout(batch), device, dtype) for batch in batches):
            break
    layout = linears[0].layout
    return [
        Prepared(backend.name, backend.prepare(batch, dtype), _sizes(batch), layout.group_size, layout.activations)
        for batch in batches
    ]


def _joined_layout(batch: Sequence[PackedLinear]) -> LinearLayout:
    return replace(batch[0].layout, out_features=sum(linear.layout.out_features for linear in batch))


def _sizes(batch: Sequence[PackedLinear]) -> tuple[int, ...]:
    return tuple(linear.layout.out_features for linear in batch)
