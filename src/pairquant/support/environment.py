"""The device and the versions that a measurement was made with; every command that measures records them."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """Return the name of the device, such as "NVIDIA H100 80GB HBM3" or "AMD EPYC 9554, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package, of PyTorch and of Transformers."""
    packages = ("pairquant", "torch", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, f"{platform.machine()} CPU")
