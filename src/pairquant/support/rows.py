"""Read files of rows (JSON lines, JSON, CSV) and of plain text; only pieces of a large file, if the caller asks for that."""

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

#: Files of up to this many bytes are read whole. The bundled texts and WikiText-2 are smaller.
LARGE = 16 * 2**20
#: A longer plain text is cut into documents of this many bytes, because a tokenizer needs 170 times their size in memory.
DOCUMENT = 2**18
#: The longest cell of a CSV file, in characters. Python's own limit, 131072, is shorter than many documents.
CELL = 2**30
BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class Pieces:
    """Which pieces of a large file to read: it is divided into `count` equal stretches, and one piece is read from each.

    size: bytes of a piece, approximately; seed: decides where in its stretch each piece lies.
    """

    count: int
    size: int
    seed: int

    def spare(self, path: Path) -> bool:
        """Tell whether to read pieces only: the file is large, and longer than all pieces together."""
        return path.stat().st_size > max(LARGE, self.count * self.size)

    def places(self, length: int) -> list[int]:
        """Return the byte at which each piece begins in a file of `length` bytes."""
        generator, stretch = random.Random(self.seed), length / self.count
        return [int(i * stretch + generator.random() * (stretch - self.size)) for i in range(self.count)]

    def step(self, path: Path) -> int:
        """Return n such that taking every n-th row gives about as much text as the pieces.

        This is for formats in which a row can only be found by reading all that is before it.
        """
        return max(1, path.stat().st_size // (self.count * self.size))


def rows_of(path: Path, pieces: Pieces | None = None) -> Iterator[tuple[str, Any]]:
    """Yield, for each row of the file, its place ("chats.jsonl, line 3") and its value.

    The file's suffix must be in `ROW_READERS`. pieces: which part of a large file to read; None: all of it. Raises
    `TextError` for a file that is not UTF-8, or not in the format of its suffix.
    """
    reader = ROW_READERS[path.suffix.lower()]
    return reader(path, pieces if pieces and pieces.spare(path) else None)


def plain_text(path: Path, pieces: Pieces | None = None) -> Iterator[str]:
    """Yield the text of a file: whole if it is small, else as several documents.

    pieces: which part of a large file to read, rounded to whole lines; None: all of it. Raises `TextError` if the file is
    not UTF-8.
    """
    if pieces and pieces.spare(path):
        yield from _separate(path, pieces)
    elif path.stat().st_size > LARGE:
        yield from _consecutive(path)
    else:
        yield _decoded(path.read_bytes(), path).replace("\r\n", "\n").replace("\r", "\n")


def _consecutive(path: Path) -> Iterator[str]:
    """Yield all of a large file, one document after the other."""
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
    """Yield each piece: whole lines, or only whole characters where a line is longer than a piece."""
    with path.open("rb") as file:
        for place in _beginnings(file, pieces, pieces.size):
            content = file.read(pieces.size) + file.readline(pieces.size)
            begin, end = _continued(content) if place else 0, len(content) - _unfinished(content)
            yield _decoded(content[begin:end], path, place + begin).replace("\r\n", "\n")


def _beginnings(file: BinaryIO, pieces: Pieces, longest: int = -1) -> Iterator[int]:
    """Move the file to the first whole line of each piece in turn, and yield the byte at which that line begins.

    longest: a line that is longer than this many bytes is cut there; -1: lines are never cut. If the caller read beyond
    the beginning of the next piece, that piece begins where the caller stopped, so that no line is read twice.
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
    """Return how many bytes at the beginning, three at most, belong to a UTF-8 character that began before them."""
    return next((n for n, byte in enumerate(content[:3]) if byte & 0xC0 != 0x80), min(3, len(content)))


def _unfinished(content: bytes) -> int:
    """Return how many bytes at the end are the beginning of a UTF-8 character whose other bytes are missing."""
    for length in range(1, min(3, len(content)) + 1):
        byte = content[-length]
        if byte & 0xC0 == 0xC0:  # the first byte of a character of 2, 3 or 4
            return length if length < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4) else 0
        if byte < 0x80:
            return 0
    return 0


def _decoded(content: bytes, path: Path, place: int = 0, where: str = "") -> str:
    """Decode bytes of the file as UTF-8.

    place: the byte of the file at which they begin; where: words to add to it, for the message. Raises `TextError`.
    """
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
    """Yield the rows of a file that holds a list of rows, a single row, or one row per line.

    The last is the format of .jsonl files; many tools also give such files the suffix .json.
    """
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
    """Yield each row as a dict whose keys are the names in the file's first line."""
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
    """Return every n-th row (see `Pieces.step`), starting at a row that the seed decides; all rows if pieces is None."""
    if pieces is None:
        return rows
    step = pieces.step(path)
    return islice(rows, random.Random(pieces.seed).randrange(step), None, step)


#: The function that reads the rows of a file, by the file's suffix in lower case.
ROW_READERS: dict[str, Callable[[Path, Pieces | None], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
}
