"""Choose a device by name, make it the current one, and ask how much memory it has free."""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from typing import Any

import torch

from .errors import ConfigError, did_you_mean


def resolve_device(name: str) -> torch.device:
    """Return the device for "auto" (a GPU if there is one, else the CPU), "cpu", "cuda", "cuda:0", "cuda:1", ….

    If torchrun started several processes, "auto" and "cuda" give each process its own GPU. Raises `ConfigError` for any
    other name, and if there are fewer GPUs than processes.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    allowed = ["auto", "cpu", *(["cuda"] if gpus else []), *gpus]
    if name not in allowed:
        absent = " (no CUDA device was found)" if name.startswith("cuda") and not gpus else ""
        raise ConfigError(f"device is {name!r}{absent}, allowed: {', '.join(allowed)}{did_you_mean(name, allowed)}")
    if name == "auto" and not gpus:
        return torch.device("cpu")
    if name in ("auto", "cuda"):
        own = int(os.environ.get("LOCAL_RANK", "0"))
        if own >= len(gpus):
            raise ConfigError(f"process {own} has no GPU of its own: there are {len(gpus)}. Lower --nproc-per-node.")
        return torch.device(gpus[own])
    return torch.device(name)


_AS_IT_IS: AbstractContextManager[None] = contextlib.nullcontext()


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which the GPU is the current one, as launching a kernel requires; does nothing for a CPU."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _AS_IT_IS
    return torch.cuda.device(device)


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are free: those of the GPU, or for the CPU those of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
