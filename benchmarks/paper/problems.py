"""The paper's reasoning problems as files that `pairquant eval --boxed` reads; needs the data sets' hub.

    python benchmarks/paper/problems.py {aime-24,aime-25,gpqa-diamond,mmlu-pro} OUTPUT.jsonl

AIME's answers are integers. Multiple choice becomes a letter in the box, with the choices in a seeded order: the right
one comes first in GPQA's file. GPQA is gated: accept its terms and log in.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

#: Name → data set, configuration, split: those that the original's own scripts read.
SETS = {
    "aime-24": ("Maxwell-Jia/AIME_2024", "default", "train"),
    "aime-25": ("yentinglin/aime_2025", "default", "train"),
    "gpqa-diamond": ("Idavidrein/gpqa", "gpqa_diamond", "train"),
    "mmlu-pro": ("TIGER-Lab/MMLU-Pro", "default", "test"),
}


def multiple_choice(question: str, choices: Sequence[str], right: int, order: random.Random) -> dict[str, str]:
    """A problem whose answer is the letter that choice number `right` gets in a random order."""
    places = list(range(len(choices)))
    order.shuffle(places)
    options = "\n".join(f"{chr(65 + letter)}) {choices[place]}" for letter, place in enumerate(places))
    instruction = "The answer is the letter of one of these choices."
    return {"problem": f"{question}\n\n{instruction}\n\n{options}", "answer": chr(65 + places.index(right))}


def problem(name: str, row: Mapping[str, Any], order: random.Random) -> dict[str, str]:
    """One row of a data set as a problem; `order` shuffles choices."""
    if name == "gpqa-diamond":
        wrong = [row[f"Incorrect Answer {number}"] for number in (1, 2, 3)]
        return multiple_choice(row["Question"], [row["Correct Answer"], *wrong], 0, order)
    if name == "mmlu-pro":
        return multiple_choice(row["question"], row["options"], ord(row["answer"]) - 65, order)
    fields = {key.lower(): value for key, value in row.items()}
    return {"problem": fields["problem"], "answer": str(fields["answer"])}


def problems(name: str, rows: Iterable[Mapping[str, Any]], seed: int = 42) -> list[dict[str, str]]:
    order = random.Random(seed)
    return [problem(name, row, order) for row in rows]


def main() -> None:
    from datasets import load_dataset

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETS)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    data_set, configuration, split = SETS[options.name]
    rows = problems(options.name, load_dataset(data_set, configuration, split=split))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} problems in {options.output}")


if __name__ == "__main__":
    main()
