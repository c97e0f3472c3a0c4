"""Choosing a device by name, and making it the current one."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

from .errors import ConfigError, did_you_mean


def resolve_device(name: str) -> torch.device:
    """ "auto" (CUDA when there is one, else the CPU), "cpu", "cuda", "cuda:0", …; raises `ConfigError`."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    allowed = ["auto", "cpu", *(["cuda"] if gpus else []), *gpus]
    if name not in allowed:
        absent = " (no CUDA device was found)" if name.startswith("cuda") and not gpus else ""
        raise ConfigError(f"device is {name!r}{absent}, allowed: {', '.join(allowed)}{did_you_mean(name, allowed)}")
    if name == "auto":
        return torch.device("cuda:0" if gpus else "cpu")
    return torch.device(name)


def current(device: torch.device) -> AbstractContextManager:
    """Make a GPU the current one, as launching a kernel on it needs; nothing to do on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
