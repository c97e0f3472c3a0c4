"""Whether Triton is there, and which table of tiles a device uses."""

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


def device_class(device: torch.device) -> str:
    """Return the class of a device, such as "sm90" for an H100, by which `kernels.run.table` is ordered; "interpreter" in tests without a GPU."""
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"
