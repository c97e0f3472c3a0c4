"""`pairquant inspect`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..support.formatting import block_and_rest
from .app import Model, app, console, quiet_libraries
from .display import duration, number, percent, plain, scientific, short_name, size


@app.command()
def inspect(
    model: Model,
    linear: Annotated[str | None, typer.Option(help="Follow this layer's weight step by step.")] = None,
) -> None:
    """What a checkpoint holds; every stored tensor is checked."""
    quiet_libraries()
    from ..jobs.inspect import inspect as open_and_check
    from ..jobs.trace import trace

    if linear is not None:
        steps, remark = trace(model, linear)
        console.print(_life_table(linear, steps))
        console.print(f"[dim]spread: max|w| / rms; error: relative to the original. {escape(remark)}[/]")
        return
    found = open_and_check(model)
    config, report = found.checkpoint.config, found.checkpoint.report
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    provenance = config.provenance or {}
    shared = f", {len(config.shared_rotations)} shared transforms" if config.shared_rotations else ""
    table.add_row("format", f"{config.spec}{shared}")
    table.add_row(
        "bits per weight", f"{found.checkpoint.bits_per_weight():.2f} in {len(found.linears)} quantized layers"
    )
    table.add_row("size", size(found.size))
    for key in ("tool", "source", "preset", "seed", "calibration", "calibration_tokens", "calibration_sha256", "bos"):
        if key in provenance:
            table.add_row(key.replace("_", " "), escape(plain(provenance[key])))
    if "seconds" in report:
        table.add_row("quantized in", duration(report["seconds"]))
    console.print(table)
    console.print(_error_table(found.linears))
    console.print("[dim]% relative error of each layer's output on the calibration text; all tensors checked[/]")
    if found.unknown:
        console.print(f"[dim]not whether any tensor is missing: {escape(found.unknown)}[/]")


def _error_table(linears: dict[str, dict[str, Any]]) -> Table:
    """A row per block, a column per kind of layer."""
    rows: dict[str, dict[str, Any]] = {}
    for path, entry in linears.items():
        block, name = block_and_rest(path)
        rows.setdefault(block, {})[name] = entry
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("block", no_wrap=True)
    for name in columns:
        table.add_column(short_name(name), justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    for block, row in rows.items():
        cells = [percent(row[name]["error"]) if name in row else "" for name in columns]
        table.add_row(block, *cells, size(sum(entry["bytes"] for entry in row.values())))
    return table


def _life_table(linear: str, steps: list[Any]) -> Table:
    table = Table(title=linear, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column, justify in (("step", "left"), ("tensor", "left"), ("dtype", "left"), ("shape", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("spread", justify="right")
    table.add_column("error", justify="right")
    for step in steps:
        shape = " × ".join(map(str, step.shape))
        table.add_row(step.name, step.tensor, step.dtype, shape, number(step.spread, 1), scientific(step.error))
    return table
