"""The memory that decoded weights may take beside their codes. Environment variables give it; by default there is none."""

from __future__ import annotations

import math
import os
import threading
import warnings
import weakref
from functools import cache

from torch import Tensor

from ...support.errors import ConfigError

#: By the type of the device, the variable with a number of GiB for each process.
VARIABLES = {"cpu": "PAIRQUANT_CPU_DECODED_GIB", "cuda": "PAIRQUANT_GPU_DECODED_GIB"}


class Budget:
    """Counts the bytes of decoded weights that exist. limit: how many there may be at a time; name: of what gives it.

    Warns once when a limit above 0 leaves no more.
    """

    def __init__(self, limit: int, name: str = "the limit"):
        self.limit, self.name, self.taken, self.told = limit, name, 0, limit == 0
        self.lock = threading.Lock()

    def take(self, nbytes: int) -> bool:
        """Take so many bytes, if they are left; tells whether they were."""
        with self.lock:
            if fits := self.taken + nbytes <= self.limit:
                self.taken += nbytes
            first, self.told = not fits and not self.told, self.told or not fits
        if first:
            warnings.warn(
                f"{self.name} holds no more decoded weights: {self.taken / 2**30:.2f} of {self.limit / 2**30:.2f} GiB are taken. "
                "This layer, and others that follow, keep their codes alone, which is slower for many tokens. Raise it to keep more.",
                stacklevel=2,
            )
        return fits

    def give_back_with(self, tensor: Tensor) -> None:
        """Give the bytes of a tensor back when it is freed."""
        weakref.finalize(tensor, self.give_back, tensor.nbytes)

    def give_back(self, nbytes: int) -> None:
        """Give back so many bytes that were taken."""
        with self.lock:
            self.taken -= nbytes


@cache
def budget(device: str) -> Budget:
    """Return this process's budget on devices of a type of `VARIABLES`; all GPUs of a process share one.

    Raises `ConfigError` if the variable is not a number of at least 0.
    """
    name = VARIABLES[device]
    return Budget(limit_of(name, settings()[name]), name)


def settings() -> dict[str, str]:
    """Return the text of each of `VARIABLES`, "0" where it is not set: with the same, the same weights of a model are kept."""
    return {variable: os.environ.get(variable, "0") for variable in VARIABLES.values()}


def limit_of(variable: str, text: str) -> int:
    """Return the bytes that a number of GiB means; raises `ConfigError`, which names the variable, for anything else."""
    try:
        gib = float(text)
    except ValueError:
        gib = math.nan
    if not 0 <= gib < math.inf:
        raise ConfigError(
            f"{variable} is {text!r}, allowed: a number of GiB, 0 or more. Unset it to keep no decoded weights."
        )
    return int(gib * 2**30)
