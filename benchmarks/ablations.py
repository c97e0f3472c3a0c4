"""The paper's ablations (its tables 5 and 6, and more) on one model, as tables: each row a recipe of bench_quality.py.

    python benchmarks/ablations.py MODEL [--table transform …] [--group-size 64] [--out benchmarks/results/ablations.jsonl]

A row that the output file has already is not run again; a GPU is advisable (20 to 60 s a row on an H200). An output file
is one model's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from recipes import config_from
from setting import SETTING

from pairquant.spec.options import QuantConfig

#: Table → row label → recipe. Stage 2 trains weights and quantizers after the transform.
STAGES = {"off": "training.weight_epochs=0", "on": "training.weight_epochs=10"}
TRANSFORMS = {
    "none": "transform=False",
    "scales": "rotations=0",
    "8 rotations": "channel_scales=False",
    "both": "rotations=8",
}
TABLES = {
    "transform": {
        f"{name}, stage 2 {stage}": f"paper:{option},{change}"
        for name, option in TRANSFORMS.items()
        for stage, change in STAGES.items()
    },
    "rotations": {
        f"{preset}, K = {k}": f"{preset}:rotations={k}" for preset in ("fast", "paper") for k in (0, 1, 2, 4, 8, 16)
    },
    "samples": {
        f"{preset}, {n} windows": f"{preset}:samples={n}" for preset in ("fast", "paper") for n in (32, 128, 512)
    },
    "pairs": {name: f"fast:pair_selection={name}" for name in ("random", "magnitude")},
    "shared": {"one transform each": "fast:share_rotations=False", "shared": "fast:share_rotations=True"},
    "presets": {name: f"{name}:rotations=8" for name in ("quick", "fast", "best", "paper")},
    "text": {f"{preset}, {n} windows": f"{preset}:samples={n}" for preset in ("best", "paper") for n in (64, 256)},
}


def configured(recipe: str, group_size: int = SETTING["group_size"]) -> QuantConfig:
    return config_from(recipe, **{**SETTING, "group_size": group_size})


def finished(out: Path) -> dict[QuantConfig, dict]:
    """Rows by what their recipes come to: `paper` is also `paper:rotations=8`."""
    lines = out.read_text().splitlines() if out.exists() else []
    return {configured(row["recipe"], row["group_size"]): row for row in map(json.loads, lines)}


def table(name: str, rows: dict[QuantConfig, dict], group_size: int) -> str:
    lines = [f"| {name} | recipe | WikiText2 perplexity | KL | GSM8K KL | s |", "| --- | --- | --- | --- | --- | --- |"]
    for label, recipe in TABLES[name].items():
        if row := rows.get(configured(recipe, group_size)):
            wiki, gsm = row["wikitext2-test"], row["gsm8k-test"]
            numbers = f"{wiki['perplexity']:.2f} | {wiki['kl']:.4f} | {gsm['kl']:.4f} | {row['seconds']:.0f}"
            lines.append(f"| {label} | `{recipe}` | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--table", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ablations.jsonl"))
    parser.add_argument("--group-size", type=int, default=SETTING["group_size"])
    options = parser.parse_args()
    size = options.group_size
    wanted = [recipe for name in options.table for recipe in TABLES[name].values()]
    done = finished(options.out)
    missing = [recipe for recipe in dict.fromkeys(wanted) if configured(recipe, size) not in done]
    if missing:
        script = Path(__file__).with_name("bench_quality.py")
        command = [sys.executable, script, options.model, *missing, "--out", options.out, "--group-size", str(size)]
        subprocess.run(command, check=True)
    print("\n\n".join(table(name, finished(options.out), size) for name in options.table))


if __name__ == "__main__":
    main()
