"""`pairquant compare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..support.formatting import departure, distinct_ends
from .app import Device, Trust, app, console, quiet_libraries
from .display import duration, followed, number, progress_bars, require_place, size
from .evaluation_options import (
    AnsweringEngine,
    AnswerTokens,
    Batch,
    Bos,
    ChainCount,
    ChainTokens,
    Gsm8k,
    JsonFile,
    MaxTokens,
    Seed,
    SeqLen,
    TaskNames,
    Texts,
    names_in,
)
from .evaluation_tables import accuracy_cells, divergence, measurements

#: As they are named here, and what `comparison.compare` returns.
Rows = Sequence[tuple[str, dict[str, Any]]]


@app.command()
def compare(
    original: Annotated[str, typer.Argument(help="The model that the others were made from.")],
    models: Annotated[list[str], typer.Argument(help="Models to compare: ours, or any that Transformers loads.")],
    text: Texts = None,
    seq_len: SeqLen = 2048,
    max_tokens: MaxTokens = None,
    bos: Bos = "auto",
    chains: ChainCount = 0,
    chain_tokens: ChainTokens = 1024,
    gsm8k: Gsm8k = 0,
    answer_tokens: AnswerTokens = 1024,
    tasks: TaskNames = None,
    batch: Batch = 8,
    engine: AnsweringEngine = "auto",
    speed: Annotated[bool, typer.Option("--speed", help="Also measure prefill and decoding speed.")] = False,
    seed: Seed = 0,
    json_file: JsonFile = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Several models beside the original: divergence, perplexity, chains of thought, answers, size, speed."""
    quiet_libraries()
    from ..evaluation.chains import ChainPlan
    from ..evaluation.reasoning import AnswerPlan
    from ..evaluation.speed import Workload
    from ..evaluation.tasks import TaskPlan
    from ..jobs.compare import compare as run

    require_place(json_file)
    names = names_in(tasks)
    with progress_bars() as bars:
        results = run(
            original,
            models,
            text or (),
            seq_len=seq_len,
            max_tokens=max_tokens,
            bos=bos,
            chains=ChainPlan(chains, chain_tokens, batch, seed) if chains else None,
            gsm8k=gsm8k or None,
            answers=AnswerPlan(answer_tokens, batch, seed=seed),
            tasks=TaskPlan(names, batch=batch, seed=seed) if names else None,
            speed=Workload(seed=seed) if speed else None,
            engine=engine,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
            on_part=followed(bars),
        )
    _show(results)
    for notice in dict.fromkeys(told for row in results["rows"] for told in row["evaluation"]["notices"]):
        console.print(f"[yellow]{escape(notice)}[/]")
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")


def _show(results: dict[str, Any]) -> None:
    """A table for each part that was asked for."""
    rows = results["rows"]
    named = list(zip(map(escape, distinct_ends([Path(row["name"]) for row in rows])), rows, strict=True))
    console.print(_models(named))
    for name, ranking in results["closest"].items():
        console.print()
        console.print(_text(name, named, ranking))
    if "closest_along_chains" in results:
        console.print()
        console.print(_chains(named, results["closest_along_chains"]))
    if (answered := _answers(named)).row_count:
        console.print()
        console.print(answered)


def _models(rows: Rows) -> Table:
    speeds = ("prefill", "decode") if rows[0][1]["speed"] else ()
    table = measurements("model", ("bits per weight", "size", "quantized in", *speeds))
    for label, row in rows:
        table.add_row(
            label,
            f"{row['evaluation']['bits_per_weight']:.2f}",
            size(row["size_bytes"]),
            "" if row["quantized_in_s"] is None else duration(row["quantized_in_s"]),
            *(f"{row['speed']['rows'][0][f'{part}_tokens_per_s']:,.1f}/s" for part in speeds),
        )
    return table


def _text(name: str, rows: Rows, ranking: dict[str, Any]) -> Table:
    """Behind: how much further from the original than the closest, with half the interval."""
    table = measurements(
        escape(Path(name).name), ("perplexity", "KL, along windows", "top-1 kept", "behind the\nclosest")
    )
    for label, row in rows:
        found = row["evaluation"]["texts"][name]
        table.add_row(
            label,
            f"{found['perplexity']:.3f}",
            divergence(found),
            number(found["top1"], 4),
            _behind(row, ranking),
        )
    return table


def _chains(rows: Rows, ranking: dict[str, Any]) -> Table:
    table = measurements("chains", ("KL, along chains", "departs\nat token", "never", "behind the\nclosest"))
    for label, row in rows[1:]:
        found = row["evaluation"]["chains"]
        departs, never = departure(found["departure_median"]), f"{found['never_departed']:.0%}"
        table.add_row(label, divergence(found), departs, never, _behind(row, ranking))
    return table


def _behind(row: dict[str, Any], ranking: dict[str, Any]) -> str:
    if row["name"] == ranking["model"]:
        return "closest"
    gap = ranking["ahead_of"].get(row["name"])
    if gap is None:
        return ""
    reach = "" if gap["interval"] is None else f" [dim]± {(gap['interval'][1] - gap['interval'][0]) / 2:.4f}[/]"
    return f"{gap['kl']:+.4f}{reach}"


def _answers(rows: Rows) -> Table:
    """A row for each set of problems or task and model, paired with the original."""
    table = measurements("answers", ("model", "accuracy, %", "changed", "p", "no worse"))
    for label, row in rows[1:]:
        for name, accuracy, _, *pair in accuracy_cells(row["evaluation"]):
            table.add_row(name, label, accuracy, *pair)
    return table
