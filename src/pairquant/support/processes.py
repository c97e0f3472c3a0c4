"""Run work in a separate process.

There are two reasons: peak memory can only be measured for a whole process, and inference engines free all their memory
only when their process ends.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

from .errors import PairQuantError, ResourceError

#: Seconds that a process may take to end after it has sent its result.
GRACE = 10


class Job(Protocol):
    """A description of work to do on a model, which it names."""

    @property
    def model(self) -> str: ...


AnyJob = TypeVar("AnyJob", bound=Job)
#: Yields strings while it works, and its result at the end. Must be defined at the top level of a module, because the new
#: process imports it by name.
Work = Callable[[AnyJob], Iterator[str | dict[str, Any]]]


def in_own_process(work: Work[AnyJob], job: AnyJob, tell: Callable[[str], None], remedy: str) -> dict[str, Any]:
    """Run `work(job)` in a new process, pass the strings that it yields to `tell`, and return its result.

    remedy: the options to lower if the process ran out of memory, for the error message. Raises any `PairQuantError` that
    the work raises, and `ResourceError` if the process ends without a result.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_send, args=(work, job, theirs))
    process.start()
    theirs.close()
    try:
        while isinstance(message := ours.recv(), str):
            tell(message)
        process.join(GRACE)
    except EOFError as error:
        process.join(GRACE)
        raise ResourceError(
            f"the process that ran {job.model!r} ended with exit code {process.exitcode}. Its error is printed above; "
            f"if there is none, memory ran out: lower {remedy}."
        ) from error
    finally:
        process.terminate()
        process.join()
    if isinstance(message, PairQuantError):
        raise message
    return message


def _send(work: Work[AnyJob], job: AnyJob, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the parent then ends this one
    try:
        for message in work(job):
            connection.send(message)
    except PairQuantError as error:
        connection.send(error)
