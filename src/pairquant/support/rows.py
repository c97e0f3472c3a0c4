"""Files of rows (JSON lines, JSON, CSV) and of plain text; of a large one only pieces, where that is asked for."""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from .errors import TextError

#: Bytes up to which a file is read whole. The bundled texts and WikiText-2 are smaller.
LARGE = 16 * 2**20
#: Bytes of a longer plain text that make one document: a tokenizer takes 170 times their size in memory.
DOCUMENT = 2**18
#: The longest cell of a CSV file, in characters. Python's own limit, 131072, is shorter than many a document.
CELL = 2**30
BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class Pieces:
    """What to read of a large file: `count` pieces of about `size` bytes, one out of each of as many equal stretches."""

    count: int
    size: int
    seed: int

    def spare(self, path: Path) -> bool:
        """Return whether the file is large, and more than the pieces."""
        return path.stat().st_size > max(LARGE, self.count * self.size)

    def places(self, length: int) -> list[int]:
        """Return where in a file of `length` bytes the pieces begin: where in its stretch each lies, the seed decides."""
        generator, stretch = random.Random(self.seed), length / self.count
        return [int(i * stretch + generator.random() * (stretch - self.size)) for i in range(self.count)]

    def step(self, path: Path) -> int:
        """Return n, where every n-th row is taken: for files whose rows are only found by reading all of them."""
        return max(1, path.stat().st_size // (self.count * self.size))


def rows_of(path: Path, pieces: Pieces | None = None) -> Iterator[tuple[str, Any]]:
    """Yield each row of a file in `ROW_READERS`, and where it stands: "chats.jsonl, line 3". Raises `TextError`."""
    reader = ROW_READERS[path.suffix.lower()]
    return reader(path, pieces if pieces and pieces.spare(path) else None)


def plain_text(path: Path, pieces: Pieces | None = None) -> Iterator[str]:
    """Yield a file's text: whole, or of a large one pieces that begin and end with a line. Raises `TextError`."""
    if pieces and pieces.spare(path):
        yield from _separate(path, pieces)
    elif path.stat().st_size > LARGE:
        yield from _consecutive(path)
    else:
        yield _decoded(path.read_bytes(), path).replace("\r\n", "\n").replace("\r", "\n")


def _consecutive(path: Path) -> Iterator[str]:
    """Yield all of a large file, a document after the other."""
    with path.open("rb") as file:
        rest, place = b"", 0
        while content := file.read(DOCUMENT):
            content = rest + content + file.readline(DOCUMENT)
            end = len(content) - _unfinished(content)
            yield _decoded(content[:end], path, place).replace("\r\n", "\n")
            rest, place = content[end:], place + end
        if rest:
            yield _decoded(rest, path, place)


def _separate(path: Path, pieces: Pieces) -> Iterator[str]:
    """Yield each piece: whole lines, or whole characters where a line is longer than a piece."""
    with path.open("rb") as file:
        for place in _beginnings(file, pieces, pieces.size):
            content = file.read(pieces.size) + file.readline(pieces.size)
            begin, end = _continued(content) if place else 0, len(content) - _unfinished(content)
            yield _decoded(content[begin:end], path, place + begin).replace("\r\n", "\n")


def _beginnings(file: BinaryIO, pieces: Pieces, longest: int = -1) -> Iterator[int]:
    """Go to each piece's first line in turn, and yield its byte. longest: bytes after which a line counts as ended.

    What was read for one piece is not read again for the next.
    """
    done = 0
    for place in pieces.places(os.fstat(file.fileno()).st_size):
        if place > done:
            file.seek(place - 1)
            file.readline(longest)
        else:
            file.seek(done)
        yield file.tell()
        done = file.tell()


def _continued(content: bytes) -> int:
    """Return how many bytes at the beginning, three at most, belong to a UTF-8 character that began before."""
    return next((n for n, byte in enumerate(content[:3]) if byte & 0xC0 != 0x80), min(3, len(content)))


def _unfinished(content: bytes) -> int:
    """Return how many bytes at the end are the beginning of a UTF-8 character."""
    for length in range(1, min(3, len(content)) + 1):
        byte = content[-length]
        if byte & 0xC0 == 0xC0:  # the first of 2, 3 or 4
            return length if length < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4) else 0
        if byte < 0x80:
            return 0
    return 0


def _decoded(content: bytes, path: Path, place: int = 0, where: str = "") -> str:
    """Return the text of bytes that begin at `place` of the file (or `where` in words); raises `TextError`."""
    try:
        return content.decode().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        spot = f"byte {place + error.start}{where}"
        raise TextError(f"{path} is not UTF-8 text ({error.reason} at {spot}). Save it as UTF-8.") from error


def _json_lines(path: Path, pieces: Pieces | None) -> Iterator[tuple[str, Any]]:
    for where, line in _lines_of_pieces(path, pieces) if pieces else _lines(path):
        text = _decoded(line, path, where=f" of {where.rpartition(', ')[2]}")
        if text.strip():
            yield where, _parsed(text, where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise TextError(f"{where}: not JSON ({getattr(error, 'msg', error)})") from error


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            yield f"{path}, line {number}", line


def _lines_of_pieces(path: Path, pieces: Pieces) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        for begin in _beginnings(file, pieces):
            end = begin + pieces.size
            while (place := file.tell()) < end and (line := file.readline()):
                yield f"{path}, line at byte {place}", line


def _json(path: Path, pieces: Pieces | None) -> Iterator[tuple[str, Any]]:
    """Yield a list of rows, one row, or, as many tools name JSON lines too, a row a line."""
    text = _decoded(path.read_bytes(), path)
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if getattr(error, "msg", "") != "Extra data":
            line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise TextError(f"{path}{line}: not JSON ({getattr(error, 'msg', error)})") from error
        yield from _json_lines(path, pieces)
        return
    rows = content if isinstance(content, list) else [content]
    yield from _thinned(((f"{path}, row {n}", row) for n, row in enumerate(rows, 1)), path, pieces)


def _csv(path: Path, pieces: Pieces | None) -> Iterator[tuple[str, Any]]:
    """Yield rows under the names of the first line."""
    csv.field_size_limit(CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            numbered = ((f"{path}, row {n}", row) for n, row in enumerate(csv.DictReader(file, strict=True), 1))
            yield from _thinned(numbered, path, pieces)
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error
    except csv.Error as error:
        raise TextError(f"{path}: not CSV ({error})") from error


def _thinned(rows: Iterator[tuple[str, Any]], path: Path, pieces: Pieces | None) -> Iterator[tuple[str, Any]]:
    """Return every so manieth row, beginning where the seed says."""
    if pieces is None:
        return rows
    step = pieces.step(path)
    return islice(rows, random.Random(pieces.seed).randrange(step), None, step)


#: How the rows of a file are read, by the end of its name in small letters.
ROW_READERS: dict[str, Callable[[Path, Pieces | None], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
}
