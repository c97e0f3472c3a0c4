"""What a run has finished, kept on disk block by block, so that the same command goes on where it was stopped.

A hidden directory beside the output: `journal.json` says what the run is; each finished block is `block-N.safetensors`
and then `block-N.json`, which holds its checksum: a block without the second is not finished. `streams-N.safetensors`
holds the hidden states that enter block N, where storing them is quicker than computing them again. What all blocks
became after they were finished is in `revised-N.safetensors`, and counts once `revised.json` has their checksums. Every
file is whole or absent, and durable before the next is begun; a block is written while the next one is worked on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ..spec.linear import LinearLayout, PackedLinear
from ..support.errors import CheckpointError, ConfigError
from .files import PARTIAL, checksum, durable, write_error, write_json, write_tensors
from .headers import StoredTensors

IDENTITY, LOG, REVISED = "journal.json", "log.jsonl", "revised.json"
KEPT = "Finished blocks are kept: run the same command again to continue."
#: Streams are stored if that takes at most this share of a block's time.
SNAPSHOT_SHARE = 0.05


class Journal:
    """One output's. entries: finished blocks, each the content of its json file; layouts: of the linears, by path.

    revised: what is known of the revision of all blocks, None as long as there is none.
    """

    def __init__(self, directory: Path, layouts: Mapping[str, LinearLayout]):
        self.directory, self.layouts = directory, layouts
        self.entries: list[dict[str, Any]] = []
        self.revised: dict[str, Any] | None = None
        self._lock: Any = None
        self._writer = ThreadPoolExecutor(1, "journal")
        self._begun: Future[None] | None = None
        self._bytes_per_second: float | None = None

    @staticmethod
    def beside(output: Path) -> Path:
        """Return the journal's directory for this output."""
        return output.absolute().with_name(f".{output.name}.journal")

    def lock(self) -> None:
        """Keep other runs out. Raises `ConfigError` if one is at work here, `ResourceError` if nothing can be written."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = (self.directory / "lock").open("w")
        except OSError as error:
            raise write_error(self.directory, error, "Choose another --output.") from error
        try:
            import fcntl
        except ImportError:  # Windows: two runs of the same output are not told apart
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise ConfigError(
                f"another run is writing to this output (journal {self.directory}): wait for it"
            ) from None

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Start the run that `identity`, all that decides the result, stands for; or continue it.

        Raises `ConfigError` naming what differs from the run that was begun, `CheckpointError` if a file is damaged.
        """
        for left in self.directory.glob(f"*{PARTIAL}"):
            left.unlink()
        if (self.directory / IDENTITY).exists():
            self._compare(json.loads(json.dumps(identity)))
            self.read()
            return
        try:
            write_json(self.directory / IDENTITY, identity)
        except OSError as error:
            raise write_error(self.directory, error, "Choose another --output.") from error

    def read(self) -> None:
        """Read the finished blocks and check each; raises `CheckpointError` for a damaged one."""
        while (file := self._file(self.count).with_suffix(".json")).exists():
            entry = self._json(file)
            tensors = file.with_suffix(".safetensors")
            if not tensors.exists() or checksum(tensors) != entry.get("sha256"):
                raise CheckpointError(
                    f"{tensors} is damaged (its checksum is not that of {file.name}). Delete {file.name} to do this block "
                    "and those after it again, or start over with --fresh."
                )
            self.entries.append(entry)
        for later in self.directory.glob("block-*.json"):
            if later > file:
                later.unlink()
        if (self.directory / REVISED).exists():
            self.revised = self._revision()

    @property
    def count(self) -> int:
        """How many blocks are finished."""
        return len(self.entries)

    def append(self, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
        """Finish the next block: from here on in the background. tensors: what its checkpoint holds, by full name, on the
        CPU; entry: JSON-ready. Raises what `settle` raises, of the block before.
        """
        self.settle()
        self._begun = self._writer.submit(self._append, tensors, entry)

    def settle(self) -> None:
        """Wait until all that was appended is durable; raises `ResourceError` if it cannot be."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.result()

    def _append(self, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
        file, start = self._file(self.count), time.perf_counter()
        try:
            write_tensors(file, tensors)
            self._bytes_per_second = file.stat().st_size / max(time.perf_counter() - start, 1e-9)
            complete = {**entry, "sha256": checksum(file)}
            write_json(file.with_suffix(".json"), complete)
        except (OSError, SafetensorError) as error:
            raise write_error(file, error, KEPT) from error
        self.entries.append(complete)

    def revise(self, blocks: Iterable[Mapping[str, Tensor]], entry: Mapping[str, Any]) -> None:
        """Let all finished blocks hold other tensors, in their order, by full name and on the CPU; entry: JSON-ready.

        Raises what `settle` raises. Until the last file is durable, the blocks are as they were.
        """
        self.settle()
        try:
            sums = []
            for index, tensors in enumerate(blocks):
                write_tensors(file := self._file(index, "revised"), tensors)
                sums.append(checksum(file))
            revised = {**entry, "sha256": sums}
            write_json(self.directory / REVISED, revised)
        except (OSError, SafetensorError) as error:
            raise write_error(self.directory, error, KEPT) from error
        self.revised = revised

    def _revision(self) -> dict[str, Any]:
        """Read the revision, and check its files; raises `CheckpointError` for a damaged one."""
        revised = self._json(self.directory / REVISED)
        for index, known in enumerate(revised.get("sha256", [None])):
            file = self._file(index, "revised")
            if not file.exists() or checksum(file) != known:
                raise CheckpointError(
                    f"{file} is damaged (its checksum is not that of {REVISED}). Delete {REVISED} to do this training again, "
                    "or start over with --fresh."
                )
        return revised

    def stored(self, index: int) -> StoredTensors:
        """Return one finished block's tensors, as the revision has them if there is one."""
        return StoredTensors.of_files([self._file(index, "block" if self.revised is None else "revised")])

    def packed(self, index: int) -> tuple[dict[str, PackedLinear], dict[str, Tensor]]:
        """Return one finished block: its linears by path, and what else was trained in it."""
        stored = self.stored(index)
        linears = {
            path: PackedLinear.from_tensors(path, self.layouts[path], stored.tensors_of(path))
            for path in stored.linears()
        }
        taken = stored.packed_names()
        return linears, {name: stored.load(name) for name in stored.fields if name not in taken}

    def keep_streams(self, index: int, tensors: Mapping[str, Tensor], block_seconds: float) -> None:
        """Store the streams that enter block `index`, unless that would take more than its share of a block's time.

        How long it would take is known from writing a block; the one before is durable first.
        """
        if self._bytes_per_second is None:
            self.settle()
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._bytes_per_second and size / self._bytes_per_second > SNAPSHOT_SHARE * block_seconds:
            return
        self.settle()
        try:
            write_tensors(self.directory / f"streams-{index:05}.safetensors", {n: t.cpu() for n, t in tensors.items()})
        except (OSError, SafetensorError) as error:
            raise write_error(self.directory, error, KEPT) from error
        for older in self.directory.glob("streams-*.safetensors"):
            if older.name < f"streams-{index:05}":
                older.unlink()

    def streams(self) -> tuple[int, dict[str, Tensor]] | None:
        """Return the latest streams that a finished block handed on, and the block that they enter."""
        for file in sorted(self.directory.glob("streams-*.safetensors"), reverse=True):
            index = int(file.stem.rpartition("-")[2])
            if index <= self.count:
                stored = StoredTensors.of_files([file])
                return index, {name: stored.load(name) for name in stored.fields}
        return None

    def log(self, event: Mapping[str, Any]) -> None:
        """Add a line to the machine-readable log, which will be copied beside the weights."""
        try:
            with (self.directory / LOG).open("a") as file:
                file.write(json.dumps({"time": round(time.time(), 3), **event}) + "\n")
        except OSError as error:
            raise write_error(self.directory / LOG, error, KEPT) from error

    def clear(self) -> None:
        """Forget what is finished."""
        for left in self.directory.iterdir():
            if left.name != "lock":
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def remove(self) -> None:
        """Forget the run."""
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        """Let other runs have it, once nothing is being written any more."""
        self._writer.shutdown()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _file(self, index: int, kind: str = "block") -> Path:
        return self.directory / f"{kind}-{index:05}.safetensors"

    def _compare(self, identity: Mapping[str, Any]) -> None:
        begun = self._json(self.directory / IDENTITY)
        differences = [f"  {name}: {old} then, {new} now" for name, (old, new) in _differences(begun, identity).items()]
        if differences:
            raise ConfigError(
                "a run with other arguments was begun for this output:\n" + "\n".join(differences) + "\n"
                "Run the same command as then to continue it, or add --fresh to start over."
            )

    def _json(self, file: Path) -> dict[str, Any]:
        try:
            content = json.loads(file.read_text())
        except (ValueError, OSError) as error:
            content = error
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{file} is damaged ({content}). Delete it to do without it, or start over with --fresh."
            )
        return content


def _differences(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted name → (old, new) of everything that is not equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in dict.fromkeys((*old, *new)):
            found |= _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if old == new else {path: (old, new)}


def copy_log(journal: Journal, directory: Path) -> None:
    """Copy the log to the place beside the weights."""
    log = journal.directory / LOG
    if log.exists():
        durable(directory / "pairquant.jsonl", lambda staged: shutil.copyfile(log, staged))
