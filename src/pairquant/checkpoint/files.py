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

from ..support.errors import CheckpointError, ResourceError

PARTIAL = ".partial"
#: Largest JSON file that is read: as large as safetensors lets a header be.
JSON_BYTES = 100_000_000


def durable(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary path beside `path`; afterwards `path` holds it all, also after a power cut."""
    staged = path.with_name(path.name + PARTIAL)
    try:
        staged.touch()
        mode = staged.stat().st_mode
        write(staged)
        staged.chmod(mode)  # what the umask asks for: safetensors hides its files from everybody else
        sync(staged)
        staged.replace(path)
        sync(path.parent)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that is whole or absent, also after a power cut."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    durable(path, lambda staged: save_file(contiguous, staged, {"format": "pt", **(metadata or {})}))


def write_json(path: Path, content: Any) -> None:
    """Durable, with indentation of one."""
    durable(path, lambda staged: staged.write_text(json.dumps(content, indent=1) + "\n"))


def read_json(path: Path) -> dict[str, Any]:
    """Return an object; raises `CheckpointError` for a file that is something else, nested too deeply, or larger than 100 MB."""
    try:
        with path.open("rb") as file:
            content = file.read(JSON_BYTES + 1)
        if len(content) > JSON_BYTES:
            raise ValueError(f"it is larger than {JSON_BYTES:,} bytes")
        entries = json.loads(content.decode())
        if not isinstance(entries, dict):
            raise ValueError(f"it holds {type(entries).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Download it or quantize the model again.") from error
    return entries


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
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
    """Return the user's version of a failed write: what, why, and what has become of the work."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
        word in str(error) for word in ("No space left", "File too large", "quota")
    )
    cause = "the disk is full" if full else str(error)
    return ResourceError(f"writing {str(what)!r} failed: {cause}. {consolation}")
