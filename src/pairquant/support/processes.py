"""Work in a process of its own: peak memory belongs to a process, engines do not give all of theirs back."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

from .errors import PairQuantError, ResourceError

#: Seconds that a process which has told its result may take to end.
GRACE = 10


class Job(Protocol):
    """What to do with a model, named."""

    @property
    def model(self) -> str: ...


AnyJob = TypeVar("AnyJob", bound=Job)
#: Yields strings while it works, at the end its result. A function of a module, as the process imports it by name.
Work = Callable[[AnyJob], Iterator[str | dict[str, Any]]]


def in_own_process(work: Work[AnyJob], job: AnyJob, tell: Callable[[str], None], remedy: str) -> dict[str, Any]:
    """Return the result of `work(job)` in a spawned process; `tell` is given its strings.

    Raises what the work raises of ours, and `ResourceError` when the process dies; remedy: what to lower if that was for
    want of memory.
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
            f"the process that ran {job.model!r} ended with exit code {process.exitcode}. Its message is above; without "
            f"one, memory ran out: lower {remedy}."
        ) from error
    finally:
        process.terminate()
        process.join()
    if isinstance(message, PairQuantError):
        raise message
    return message


def _send(work: Work[AnyJob], job: AnyJob, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent then ends this process
    try:
        for message in work(job):
            connection.send(message)
    except PairQuantError as error:
        connection.send(error)
