"""Files that are whole or absent: written under another name, synced to the disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ResourceError

PARTIAL = ".partial"


def durable(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary path beside `path`; afterwards `path` holds it all, also after a power cut."""
    staged = path.with_name(path.name + PARTIAL)
    try:
        write(staged)
        sync(staged)
        staged.replace(path)
        sync(path.parent)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, durable."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    durable(path, lambda staged: save_file(contiguous, staged, {"format": "pt", **(metadata or {})}))


def write_json(path: Path, content: Any) -> None:
    """Durable, with indentation of one."""
    durable(path, lambda staged: staged.write_text(json.dumps(content, indent=1) + "\n"))


def checksum(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(what: str | Path, error: OSError | SafetensorError, consolation: str) -> ResourceError:
    """The user's version of a failed write: what, why, and what has become of the work."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
        word in str(error) for word in ("No space left", "File too large", "quota")
    )
    cause = "the disk is full" if full else str(error)
    return ResourceError(f"writing {str(what)!r} failed: {cause}. {consolation}")
