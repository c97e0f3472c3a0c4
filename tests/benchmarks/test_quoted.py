"""Figures in README.md and docs/ are those of benchmarks/results, digit for digit."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README, PAGE, QUANTIZING = "README.md", "docs/results.md", "docs/quantizing.md"

BITS = "bits_per_weight"
TEXTS = ("wikitext2-test.kl", "gsm8k-test.kl")
#: What the large tables have of a quantizer: perplexity, KL, top-1, KL on GSM8K and along chains, seconds.
ALL = (BITS, "wikitext2-test.perplexity", TEXTS[0], "wikitext2-test.top1", TEXTS[1], "chains.kl", "seconds")


class Quote(NamedTuple):
    """A row of a table in a document, and what its numbers, in order, are in a row of a results file.

    begins: how the document's row begins; the numbers come after it; which: of the file's rows, or its name.
    """

    page: str
    begins: str
    file: str
    which: Callable[[dict[str, Any]], bool] | str
    paths: tuple[str, ...]


def peer(name: str, bits: int = 4) -> Callable[[dict[str, Any]], bool]:
    return lambda row: (
        (row["peer"], row["bits"], row["model"]) == (name, bits, "SmolLM2-135M-Instruct")
        and (row["windows"] == [None, 2048] and "reason" not in row)
    )


def recipe(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda row: row["recipe"] == name


def corrected(case: str) -> Callable[[dict[str, Any]], bool]:
    """Of the corrections of what rounding loses."""
    return lambda row: row["case"] == case


def trained(start: str, model: str, rate: float) -> Callable[[dict[str, Any]], bool]:
    """Of the long training as a whole."""
    return lambda row: (
        (row["start"], row["model"]) == (start, model)
        and (isinstance(how := row["end_to_end"], dict) and (how["fresh"], how["scale_rate"]) == (7, rate))
    )


ON_CPU = "**PairQuant `fast`, scales without rotations** (on a CPU) |"
NAMES = {
    "**PairQuant `best`**": ("best", (4, 3)),
    "**PairQuant `fast`**": ("fast", (4, 3)),
    "**PairQuant `quick`**": ("quick", (4, 3)),
    "AutoRound": ("autoround", (4,)),
    "the paper's recipe (`paper`)": ("paper", (4,)),
    "AWQ (llm-compressor)": ("llmcompressor-awq", (4, 3)),
    "GPTQ (llm-compressor)": ("llmcompressor-gptq", (4, 3)),
    "NF4 (bitsandbytes)": ("nf4", (4,)),
    "round to nearest": ("rtn", (4, 3)),
}
#: Peer → bits and its row in the table of equal sizes.
EQUAL = {
    ("autoround", 4): "4.25 | AutoRound 0.16 |",
    ("llmcompressor-awq", 4): "4.31 | AWQ, llm-compressor 0.14 |",
    ("llmcompressor-gptq", 4): "4.25 | GPTQ, llm-compressor 0.14 |",
    ("gptqmodel-gptq", 4): "4.25 | GPTQ, GPTQModel 7.7 |",
    ("llmcompressor-awq", 3): "3.30 | AWQ, llm-compressor 0.14 |",
    ("llmcompressor-gptq", 3): "3.25 | GPTQ, llm-compressor 0.14 |",
    ("rtn", 4): "4.34 | round to nearest |",
    ("rtn", 3): "3.32 | round to nearest |",
}
FOLDED = "smol.gguf folded (fast, 16 rotations, embeddings tied)"
H100, TRAINED, HELD_OUT = "peers-h100.jsonl", "end-to-end-h100.jsonl", "heldout-h100.json"
QUOTES = [
    *(Quote(PAGE, f"| {bits} | {label} |", H100, peer(name, bits), ALL) for label, (name, widths) in NAMES.items()
      for bits in widths),
    *(Quote(PAGE, f"| {begins}", H100, peer(*key), (*TEXTS, "seconds")) for key, begins in EQUAL.items()),
    Quote(PAGE, f"| 4 | {ON_CPU}", "peers-cpu.jsonl", peer("fast-scales"), (BITS, *TEXTS)),
    Quote(PAGE, f"| 4.34 | {ON_CPU}", "peers-cpu.jsonl", peer("fast-scales"), TEXTS),
    Quote(PAGE, "| 4.34 | **PairQuant `best`, scales without rotations, trained as a whole** |", TRAINED,
          trained("best:rotations=0", "smol.gguf", 3e-4), TEXTS),
    Quote(PAGE, "| 4.34 | **PairQuant `best`, AWQ format, trained as a whole** |", TRAINED,
          trained("best:transform=none", FOLDED, 1e-3), TEXTS),
    Quote(PAGE, "| 4.34 | **PairQuant `best`, scales without rotations** |", TRAINED,
          lambda row: (row["start"], row["end_to_end"]) == ("best:rotations=0", None), (*TEXTS, "seconds")),
    Quote(PAGE, "| 3.25 | **PairQuant `fast`, by plan** |", "mixed-h200.jsonl", lambda row: row[BITS] == 3.25,
          (*TEXTS, "seconds", "measuring_seconds")),
    *(Quote(PAGE, f"| {label} |", HELD_OUT, name, tuple("0123456")) for label, name in {
        "**PairQuant `best`**": "best", "**PairQuant `fast`**": "fast", "AutoRound 0.16": "AutoRound",
        "ParoQuant 0.1.16, the original's code": "ParoQuant, its own code", "round to nearest": "round to nearest",
        "AWQ, llm-compressor 0.14": "AWQ (llm-compressor, float32)",
    }.items()),
    *(Quote(QUANTIZING, begins, "quality-h200.jsonl", recipe(f"fast:bits={bits}"), TEXTS) for bits, begins in
      ((5, "| 5.62 |"), (6, "| 6.64 |"), (8, "| 8.67 |"))),
    *(Quote(QUANTIZING, begins, "compensation-h200.jsonl", corrected(case), (BITS, *TEXTS)) for begins, case in (
        ("| 3 bits, nothing added |", "bits=3"),
        ("| 3 bits in groups of 32, nothing added |", "bits=3,group_size=32"),
        ("| 3 bits and a low-rank product in closed form |", "bits=3+svd:16"),
        ("| 3 bits and a trained low-rank product |", "bits=3+linear:16"),
        ("| 3 bits and a trained network with SiLU |", "bits=3+silu:16"),
    )),
    Quote(QUANTIZING, "| 4 bits without rotations, nothing added |", TRAINED,
          lambda row: (row["start"], row["end_to_end"]) == ("best:rotations=0", None), (BITS, *TEXTS)),
    Quote(README, "| 0.5B, held out | **PairQuant `best`** |", HELD_OUT, "best", tuple("012")),
    Quote(README, "| | **PairQuant `fast`** |", HELD_OUT, "fast", tuple("012")),
    Quote(README, "| | ParoQuant 0.1.16, the original's code |", HELD_OUT, "ParoQuant, its own code", tuple("012")),
    Quote(README, "| SmolLM2-135M | **PairQuant `best`, [AWQ format](docs/other-formats.md#how-close)** |", TRAINED,
          trained("best:transform=none", FOLDED, 1e-3), (BITS, *TEXTS)),
    Quote(README, "| | **PairQuant `fast`, with rotations** |", H100, peer("fast"), (BITS, *TEXTS)),
    Quote(README, "| | **PairQuant `best`, with rotations** |", H100, peer("best"), (BITS, *TEXTS)),
]  # fmt: skip


def found(quote: Quote) -> dict[str, Any] | list[Any]:
    """The one row that is meant; a file in JSON has them by name."""
    text = (RESULTS / quote.file).read_text()
    if not callable(quote.which):
        return json.loads(text)["rows"][quote.which]
    rows = [row for row in map(json.loads, text.splitlines()) if quote.which(row)]
    assert len(rows) == 1, f"{len(rows)} rows of {quote.file} are meant"
    return rows[0]


def value(row: Any, path: str) -> float:
    for part in path.split("."):
        row = row[int(part)] if isinstance(row, list) else row[part]
    return row


@pytest.mark.parametrize("quote", QUOTES, ids=lambda quote: f"{quote.page}: {quote.begins}")
def test_numbers_of_a_table_are_those_of_the_results(quote):
    lines = [line for line in (ROOT / quote.page).read_text().splitlines() if line.startswith(quote.begins)]
    assert len(lines) == 1, f"{len(lines)} rows of {quote.page} begin so"
    numbers = re.findall(r"\d+(?:\.\d+)?", re.sub(r"±[^|]*|`[^`]*`", "", lines[0][len(quote.begins) :]))
    row = found(quote)
    for number, path in zip(numbers, quote.paths, strict=False):
        decimals = len(number.partition(".")[2])
        assert number == f"{value(row, path):.{decimals}f}", path
    assert len(numbers) >= len(quote.paths), "a number is missing"
