"""Tell whether Triton can be used, and which table of kernel tiles belongs to a device."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache
def triton_missing() -> str | None:
    """Say why the Triton kernels cannot be used; None if they can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install it with `pip install triton`"
    return None


@lru_cache
def device_class(device: torch.device) -> str:
    """Return the name of the device's class in `kernels.run.table`: "sm90" for an H100.

    For devices other than GPUs it is "interpreter": there, only tests run the kernels, in Triton's interpreter.
    """
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def has_float8(device: torch.device) -> bool:
    """Tell whether Triton can use float8_e4m3 on this device. Its interpreter can; of a GPU that is not there it is assumed."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    return not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9)
