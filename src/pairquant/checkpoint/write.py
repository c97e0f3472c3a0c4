"""Writing a checkpoint, all or nothing: everything goes to a directory beside the target, then is renamed into place."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ..spec.fields import Field
from ..support.errors import ConfigError, ResourceError
from .files import sync, write_error, write_json, write_tensors
from .read import ModelFiles
from .record import REPORT_FILE

#: Largest file of weights, and so the most that writing holds in memory.
SHARD_BYTES = 2_000_000_000
UNTOUCHED = "Nothing was left behind, and what was there before is untouched."


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: its dtype and shape, and how to get it."""

    field: Field
    load: Callable[[], Tensor]


def require_free(output: Path, overwrite: bool) -> None:
    """Refuse an existing output, unless it may be replaced and is a model directory."""
    if not output.exists():
        return
    if not overwrite:
        raise ConfigError(f"output {str(output)!r} exists. Choose another --output, or add --overwrite.")
    if not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").is_file()):
        raise ConfigError(f"output {str(output)!r} is not a model directory; it will not be overwritten.")


def require_apart(output: Path, source: ModelFiles) -> None:
    """Refuse an output that is the source, or holds it: overwriting would delete it."""
    place = source.directory / source.gguf if source.gguf else source.directory
    if place.resolve().is_relative_to(output.resolve()):
        raise ConfigError(f"output {str(output)!r} is the source itself, or holds it. Choose another --output.")


def require_space(output: Path, needed_bytes: int) -> None:
    """Refuse to start when the disk cannot hold the result."""
    free = shutil.disk_usage(_existing_parent(output)).free
    if free < needed_bytes:
        raise ResourceError(
            f"the checkpoint needs about {needed_bytes / 1e9:.2f} GB, the disk of {str(output)!r} has {free / 1e9:.2f} GB "
            "free. Free some, or choose another --output."
        )


def write_checkpoint(
    output: Path,
    entries: Mapping[str, Entry],
    describe: Callable[[Path], None],
    report: dict[str, Any],
    overwrite: bool = False,
    consolation: str = UNTOUCHED,
) -> None:
    """Write weights in shards, what `describe` saves (configuration, tokenizer), and the report.

    Raises `ConfigError` if the output exists, `ResourceError` if the disk fills; either leaves everything as it was.
    """
    require_free(output, overwrite)
    try:
        with _staging(output) as staging:
            _write_shards(staging, entries)
            describe(staging)
            write_json(staging / REPORT_FILE, report)
            for file in staging.rglob("*"):
                sync(file)
            _replace(staging, output)
    except (OSError, SafetensorError) as error:
        raise write_error(output, error, consolation) from error


def _write_shards(directory: Path, entries: Mapping[str, Entry]) -> None:
    """Write `model.safetensors`, or several files with an index, under the names that Transformers looks for."""
    shards = _shards(entries)
    if len(shards) == 1:
        write_tensors(directory / "model.safetensors", {name: entries[name].load() for name in shards[0]})
        return
    homes: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(directory / file, {name: entries[name].load() for name in names})
        homes |= dict.fromkeys(names, file)
    total = sum(entry.field.nbytes for entry in entries.values())
    write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": homes})


def _shards(entries: Mapping[str, Entry]) -> list[list[str]]:
    """Return names in order, cut where a file would grow beyond `SHARD_BYTES`."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.field.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += entry.field.nbytes
    return shards


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """Make a directory beside the output, removed at the end unless it was renamed; remove what killed runs left behind."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for left in output.parent.glob(f".{output.name}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    if (retired := _retired(output)).exists():
        if output.exists():
            shutil.rmtree(retired)
        else:
            retired.rename(output)
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
        retired = _retired(output)
        shutil.rmtree(retired, ignore_errors=True)
        output.rename(retired)
    staging.rename(output)
    sync(output.parent)
    if retired:
        shutil.rmtree(retired)


def _retired(output: Path) -> Path:
    """Return where an output that is being overwritten waits for its successor."""
    return output.with_name(f".{output.name}.retired")


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
