"""`pairquant eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .app import Device, Model, Trust, app, console, quiet_libraries
from .display import number, progress_bars


@app.command(name="eval")
def evaluate(
    model: Model,
    reference: Annotated[str | None, typer.Option(help="The original model, for KL and agreement.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Text to evaluate on; repeat for more. Default: GSM8K test problems.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    max_tokens: Annotated[int | None, typer.Option(help="Use at most this many tokens of each text.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Perplexity of MODEL, and its divergence from the original."""
    quiet_libraries()
    from ..verbs import evaluate as run

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise typer.BadParameter(f"no such directory: {json_file.absolute().parent}", param_hint="--json")
    with progress_bars() as bars:

        def on_windows(name: str, count: int):
            task = bars.add_task(name, total=count)
            return lambda: bars.advance(task)

        results = run(
            model,
            reference,
            text or (),
            seq_len=seq_len,
            max_tokens=max_tokens,
            device=device,
            trust_remote_code=trust_remote_code,
            on_windows=on_windows,
        )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("text", "tokens", "perplexity", "KL", "top-1 kept"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for name, row in results["texts"].items():
        table.add_row(
            name, f"{row['tokens']:,}", f"{row['perplexity']:.3f}", number(row["kl"], 4), number(row["top1"], 4)
        )
    console.print(table)
    console.print(f"{results['bits_per_weight']:.2f} bits per weight, on {results['device']}")
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")
