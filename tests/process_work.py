"""Work for processes of their own, in a module that they can import by name."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from pairquant.support.errors import ConfigError


@dataclass(frozen=True)
class Job:
    """model: any name; parent: the process that asked."""

    model: str
    parent: int


def works(job):
    yield "loading"
    yield "measuring"
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    yield {"model": job.model, "elsewhere": os.getpid() != job.parent, "ignores Ctrl-C": ignored}


def refuses(job):
    yield "loading"
    raise ConfigError(f"{job.model} is refused")


def dies(job):
    yield "loading"
    os._exit(7)


def breaks(job):
    yield "loading"
    raise RuntimeError("a bug")
