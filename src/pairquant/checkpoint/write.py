"""Writing a checkpoint, all or nothing: everything goes to a directory beside the target, then is renamed into place."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import ConfigError, ResourceError
from .read import REPORT_FILE


def require_free(output: Path, overwrite: bool) -> None:
    """Refuse an existing output, unless it may be replaced and is a model directory."""
    if not output.exists():
        return
    if not overwrite:
        raise ConfigError(f"output {str(output)!r} exists. Choose another --output, or add --overwrite.")
    if not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").is_file()):
        raise ConfigError(f"output {str(output)!r} is not a model directory; it will not be overwritten.")


def require_space(output: Path, needed_bytes: int) -> None:
    """Refuse to start when the disk cannot hold the result."""
    free = shutil.disk_usage(_existing_parent(output)).free
    if free < needed_bytes:
        raise ResourceError(
            f"the checkpoint needs about {needed_bytes / 1e9:.2f} GB, the disk of {str(output)!r} has {free / 1e9:.2f} GB "
            "free. Free some, or choose another --output."
        )


def write_checkpoint(output: Path, model, tokenizer, report: dict[str, Any], overwrite: bool = False) -> None:
    """Save a quantized model with its tokenizer and report.

    Raises `ConfigError` if the output exists, `ResourceError` if the disk fills; either leaves everything as it was.
    """
    require_free(output, overwrite)
    with _staging(output) as staging:
        try:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            (staging / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n")
            for file in staging.iterdir():
                _sync(file)
        except (OSError, SafetensorError) as error:
            raise _write_error(output, error) from error
        _replace(staging, output)


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A fresh directory beside the output, removed if it is still there in the end."""
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(staging: Path, output: Path) -> None:
    """Rename into place; an output that is being overwritten is only deleted once the new one stands."""
    staging.chmod(0o755)
    retired = None
    if output.exists():
        retired = output.with_name(f".{output.name}.retired")
        shutil.rmtree(retired, ignore_errors=True)
        output.rename(retired)
    staging.rename(output)
    _sync(output.parent)
    if retired:
        shutil.rmtree(retired)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(output: Path, error: Exception) -> ResourceError:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
        word in str(error) for word in ("No space left", "File too large", "quota")
    )
    cause = "the disk is full" if full else str(error)
    return ResourceError(
        f"writing {str(output)!r} failed: {cause}. Nothing was left behind, and what was there before is untouched."
    )


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
