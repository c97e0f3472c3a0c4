"""Read the text for calibration and evaluation; `windows` then cuts it into windows of tokens.

A source is a bundled file ("default/…", see `BUNDLED`), a local file (see `SUFFIXES`), a short name (see `SHORT_NAMES`), or
a data set that the package `datasets` can load, written `name[:config[:split]]`. Rows hold texts or chats (see
`conversations`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import resources
from itertools import islice
from pathlib import Path

from .conversations import Conversation, document_of
from .errors import TextError, did_you_mean
from .rows import ROW_READERS, Pieces, plain_text, rows_of

#: What "default" means for calibration: GSM8K training problems with worked answers (MIT licence) and Grimms' Fairy
#: Tales (public domain). Both files are part of this package.
BUNDLED = ("gsm8k-train.jsonl", "grimm.txt")
#: What calibration calls text that the model samples itself.
SELF = "self"
#: Text to evaluate on if the user names none: GSM8K test problems (MIT licence), which "default" does not calibrate on.
BUNDLED_TEST = "default/gsm8k-test.jsonl"
#: The data sets that papers use for calibration and evaluation, as `name:config:split`.
SHORT_NAMES = {
    "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1:train",
    "wikitext2-test": "Salesforce/wikitext:wikitext-2-raw-v1:test",
    "c4": "allenai/c4:en:train",
    "c4-test": "allenai/c4:en:validation",
    "redpajama": "togethercomputer/RedPajama-Data-1T-Sample::train",
    "pileval": "mit-han-lab/pile-val-backup::validation",
}
#: Suffixes of files that hold one plain text.
PLAIN = (".txt", ".md")
#: Suffixes of all files that can be read, in lower or upper case.
SUFFIXES = (*PLAIN, *ROW_READERS, ".parquet")
#: The branch on which the hub keeps its Parquet copy of a data set. It is used for data sets that come as a script,
#: because `datasets` no longer runs scripts.
EXPORTED = "refs/convert/parquet"
#: The most documents read from one data set: more text does not help (docs/decisions.md), and tokenizing it takes time.
MAX_DOCUMENTS = 20_000


def expand(source: str) -> tuple[str, ...]:
    """Return the names of the bundled files for "default", and any other source unchanged."""
    return tuple(f"default/{name}" for name in BUNDLED) if source == "default" else (source,)


def documents(name: str, pieces: Pieces | None = None) -> Iterator[str | Conversation]:
    """Yield the texts and chats of one source, in order.

    pieces: which part of a large file to read; None: all of it. Raises `TextError` if the source does not exist, cannot be
    read, or has a row that is neither text nor chat.
    """
    if name == SELF:
        raise TextError("'self', text that the model samples itself, can be calibrated on only. Name other text.")
    if name.startswith("default/"):
        with resources.as_file(_bundled(name)) as path:
            yield from _file_documents(path, pieces)
    elif (path := Path(name)).is_file():
        yield from _file_documents(path, pieces)
    elif path.suffix.lower() in SUFFIXES:
        raise TextError(f"text file {name!r} does not exist{did_you_mean(name, _files_near(path.parent))}")
    else:
        yield from _data_set_documents(SHORT_NAMES.get(name, name))


def size_in_pieces(name: str, pieces: Pieces) -> int | None:
    """Return the size in bytes of a source of which only pieces are read; None for a source that is read whole."""
    path = Path(name)
    readable = path.is_file() and path.suffix.lower() in (*PLAIN, *ROW_READERS)
    return path.stat().st_size if readable and pieces.spare(path) else None


def _bundled(name: str) -> resources.abc.Traversable:
    names = {f"default/{file}": file for file in (*BUNDLED, Path(BUNDLED_TEST).name)}
    if name not in names:
        raise TextError(f"no bundled text {name!r}, there are: {', '.join(names)}{did_you_mean(name, names)}")
    return resources.files("pairquant") / "data" / names[name]


def _files_near(directory: Path) -> list[str]:
    """Return the files of the folder whose suffix says that they hold text; none if the folder does not exist."""
    return [str(p) for p in directory.glob("*") if p.suffix.lower() in SUFFIXES] if directory.is_dir() else []


def _file_documents(path: Path, pieces: Pieces | None) -> Iterator[str | Conversation]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _rows(str(path), "parquet", data_files=str(path), split="train")
    elif suffix in PLAIN:
        yield from plain_text(path, pieces)
    elif suffix in ROW_READERS:
        yield from (document_of(row, where) for where, row in rows_of(path, pieces))
    else:
        raise TextError(
            f"text file {str(path)!r} ends in {path.suffix or 'nothing'!r}, which does not tell what format it has. Allowed: "
            f"{', '.join(SUFFIXES)}. Rename it to the suffix of its format."
        )


def _data_set_documents(name: str) -> Iterator[str | Conversation]:
    repository, *rest = name.split(":")
    config = rest[0] or None if rest else None
    split = rest[1] if len(rest) > 1 else "train"
    yield from _rows(name, repository, config, split=split, streaming=True)


def _rows(name: str, *args, **kwargs) -> Iterator[str | Conversation]:
    """Yield the texts and chats of a data set's first rows; `args` and `kwargs` are passed to `load_dataset`."""
    from datasets import load_dataset  # slow to import, and needed for few sources

    def rows() -> Iterable[object]:
        try:
            return load_dataset(*args, **kwargs)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            repository, config = args  # on that branch each configuration is a folder
            return load_dataset(repository, data_dir=config, **kwargs, revision=EXPORTED)

    try:
        for number, row in enumerate(islice(rows(), MAX_DOCUMENTS), 1):
            yield document_of(row, f"{name}, row {number}")
    except TextError:
        raise
    except Exception as error:  # `datasets` raises a dozen unrelated types if a data set is missing or unreadable
        hint = did_you_mean(name, ["default", *SHORT_NAMES, *_files_near(Path("."))])
        reason = (str(error).splitlines() or [""])[0]
        raise TextError(
            f"text source {name!r} is neither a local file nor a data set that can be loaded{hint}\n"
            f"  {type(error).__name__}: {reason}\n"
            f"  Allowed: 'default', {', '.join(SHORT_NAMES)}, a {', '.join(SUFFIXES)} file, "
            "or a data set as name[:config[:split]]."
        ) from error
