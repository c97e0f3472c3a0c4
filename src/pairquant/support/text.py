"""Where text comes from, and how it becomes windows of tokens: for calibration and for evaluation alike.

A source is a bundled file ("default/…", see `BUNDLED`), a local `.txt`, `.jsonl` or `.parquet` file, a short name (see
`SHORT_NAMES`), or the name of a data set for `datasets`, as `name[:config[:split]]`. Documents of a source are packed end
to end and cut into windows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib import resources
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from .errors import TextError, did_you_mean

#: What "default" stands for in calibration: GSM8K training problems with worked answers (MIT) and Grimms' Fairy
#: Tales (public domain). They travel inside the package.
BUNDLED = ("gsm8k-train.jsonl", "grimm.txt")
#: Text to evaluate on when none is named: GSM8K test problems (MIT), never calibrated on.
BUNDLED_TEST = "default/gsm8k-test.jsonl"
#: The data sets that papers calibrate and evaluate on, as `name:config:split`.
SHORT_NAMES = {
    "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1:train",
    "wikitext2-test": "Salesforce/wikitext:wikitext-2-raw-v1:test",
    "c4": "allenai/c4:en:train",
    "c4-test": "allenai/c4:en:validation",
    "redpajama": "togethercomputer/RedPajama-Data-1T-Sample::train",
    "pileval": "mit-han-lab/pile-val-backup::validation",
}
SUFFIXES = (".txt", ".jsonl", ".parquet")
#: Where the hub keeps its own export of data sets that come as a script, which `datasets` no longer runs.
EXPORTED = "refs/convert/parquet"
#: Documents read from a data set at the most; more text does not help (docs/decisions.md) and tokenizing takes time.
MAX_DOCUMENTS = 20_000


def expand(source: str) -> tuple[str, ...]:
    """ "default" → the bundled files' names; anything else stays."""
    return tuple(f"default/{name}" for name in BUNDLED) if source == "default" else (source,)


def documents(name: str) -> Iterator[str]:
    """The texts of one source, in order."""
    if name.startswith("default/"):
        bundled = {f"default/{file}": file for file in (*BUNDLED, Path(BUNDLED_TEST).name)}
        if name not in bundled:
            raise TextError(f"no bundled text {name!r}, there are: {', '.join(bundled)}{did_you_mean(name, bundled)}")
        with resources.as_file(resources.files("pairquant") / "data" / bundled[name]) as path:
            yield from _file_documents(path)
    elif (path := Path(name)).is_file():
        yield from _file_documents(path)
    elif path.suffix in SUFFIXES:
        nearby = [str(p) for p in path.parent.glob("*") if p.suffix in SUFFIXES] if path.parent.is_dir() else []
        raise TextError(f"text file {name!r} does not exist{did_you_mean(name, nearby)}")
    else:
        yield from _data_set_documents(SHORT_NAMES.get(name, name))


def token_windows(tokenizer, texts: Iterable[str], seq_len: int) -> Tensor:
    """All whole windows of the packed texts: int64 [windows, seq_len]."""
    texts = [text.strip() + "\n\n" for text in texts if text.strip()]
    if not texts:
        return torch.empty(0, seq_len, dtype=torch.int64)
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    flat = torch.tensor([token for ids in encoded for token in ids], dtype=torch.int64)
    return flat[: len(flat) // seq_len * seq_len].view(-1, seq_len)


def _file_documents(path: Path) -> Iterator[str]:
    if path.suffix == ".parquet":
        yield from _rows(str(path), "parquet", data_files=str(path), split="train")
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). "
            f"Allowed: {', '.join(SUFFIXES)}, or a data set name."
        ) from error
    if path.suffix == ".jsonl":
        yield from _json_lines(text, path)
    else:
        yield text


def _json_lines(text: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TextError(f"{path}, line {number}: not JSON ({error.msg})") from error
            yield _text_of(row, f"{path}, line {number}")


def _text_of(row: object, where: str) -> str:
    """A row's text: key "text", or "question" and "answer"."""
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return row["text"]
        if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
            return f"{row['question']}\n{row['answer']}"
    keys = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise TextError(f"{where}: needs a key 'text', or 'question' and 'answer'; it has {keys}")


def _data_set_documents(name: str) -> Iterator[str]:
    repository, *rest = name.split(":")
    config = rest[0] or None if rest else None
    split = rest[1] if len(rest) > 1 else "train"
    yield from _rows(name, repository, config, split=split, streaming=True)


def _rows(name: str, *args, **kwargs) -> Iterator[str]:
    """Texts of a data set's first rows; `args` and `kwargs` are `load_dataset`'s."""
    from datasets import load_dataset  # slow to import, and needed for few sources

    def rows() -> Iterable[object]:
        try:
            return load_dataset(*args, **kwargs)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            repository, config = args  # there configurations are folders
            return load_dataset(repository, data_dir=config, **kwargs, revision=EXPORTED)

    try:
        for number, row in enumerate(islice(rows(), MAX_DOCUMENTS), 1):
            yield _text_of(row, f"{name}, row {number}")
    except TextError:
        raise
    except Exception as error:  # `datasets` raises a dozen unrelated types for "not there" and "not readable"
        hint = did_you_mean(
            name, ["default", *SHORT_NAMES, *(str(p) for p in Path(".").glob("*") if p.suffix in SUFFIXES)]
        )
        reason = (str(error).splitlines() or [""])[0]
        raise TextError(
            f"text source {name!r} is neither a local file nor a data set that can be loaded{hint}\n"
            f"  {type(error).__name__}: {reason}\n"
            f"  Allowed: 'default', {', '.join(SHORT_NAMES)}, a {', '.join(SUFFIXES)} file, or a data set as name[:config[:split]]."
        ) from error
