"""`pairquant inspect`."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..support.formatting import block_and_rest, counted
from .app import Device, Model, app, console, quiet_libraries
from .display import duration, number, percent, plain, scientific, short_name, size

#: The number of an expert in a path.
NUMBER = re.compile(r"\.\d+\.")
#: The backend that runs every layer, in full precision.
DECODED = "decoded"
#: What is shown of a checkpoint's provenance, in this order.
PROVENANCE = (
    "tool", "source", "preset", "seed", "calibration", "calibration_tokens", "end_to_end_tokens", "calibration_sha256", "bos",
)  # fmt: skip


@app.command(epilog="Example: pairquant inspect MODEL-PARO --backends")
def inspect(
    model: Model,
    linear: Annotated[str | None, typer.Option(help="Follow this layer's weight step by step.")] = None,
    show_backends: Annotated[
        bool,
        typer.Option("--backends", help="Show what runs each layer on this machine, and why not something better."),
    ] = False,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of the activations: bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Show what a quantized MODEL holds, and check every stored tensor."""
    quiet_libraries()
    from ..core.rounding import poor_errors
    from ..jobs.inspect import backends
    from ..jobs.inspect import inspect as open_and_check
    from ..jobs.trace import trace

    if show_backends:
        _show_backends(backends(model, device, dtype))
        return

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
    for place, spec in enumerate(found.checkpoint.specs()):
        table.add_row("" if place else "format", spec if place else spec + shared)
    if config.modules_to_not_convert:
        plain_layers = config.modules_to_not_convert
        table.add_row("left plain", f"{counted(len(plain_layers), 'layer')}, {_ends(plain_layers)}")
    table.add_row(
        "bits per weight",
        f"{found.checkpoint.bits_per_weight():.2f} in {counted(len(found.linears), 'quantized layer')}",
    )
    table.add_row("size", size(found.size))
    for key in PROVENANCE:
        if key in provenance:
            table.add_row(key.replace("_", " "), escape(plain(provenance[key])))
    if "seconds" in report:
        table.add_row("quantized in", duration(report["seconds"]))
    if found.checkpoint.trained_whole is not None:
        before, after = found.checkpoint.trained_whole
        table.add_row(
            "trained as a whole", f"KL {before:.4f} → {after:.4f} on text held out; errors are from before it"
        )
    for place, line in enumerate(_run_by(backends(model, device, dtype))):
        table.add_row("" if place else "run here by", escape(line))
    console.print(table)
    inside = {path: entry for path, entry in found.linears.items() if block_and_rest(path)[0]}
    if inside:
        console.print(_error_table(inside))
    for path, entry in found.linears.items():
        if path not in inside:
            console.print(f"{escape(short_name(path))}  {percent(entry['error'])}  {size(entry['bytes'])}")
    console.print("[dim]% relative error of each layer's output on the calibration text; all tensors checked[/]")
    if poor := poor_errors({path: entry["error"] for path, entry in found.linears.items()}):
        worst = ", ".join(f"{path} {error:.0%}" for path, error in list(poor.items())[:5])
        console.print(f"[yellow]{counted(len(poor), 'layer')} with an error above 20 %: {escape(worst)}[/]")
    if found.unknown:
        console.print(f"[dim]not whether any tensor is missing: {escape(found.unknown)}[/]")


def _ends(paths: Any) -> str:
    """Return the last names of modules, each once."""
    return escape(", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths)))


def _run_by(rows: list[Any]) -> list[str]:
    """Return what runs how many layers on this machine; of decoded ones, the widths and formats for which there is no kernel here."""
    counts: dict[str, int] = {}
    decoded: set[str] = set()
    for row in rows:
        counts[row.explanation.label] = counts.get(row.explanation.label, 0) + row.count
        if row.explanation.backend == DECODED:
            decoded.add(row.layout.weights or f"{row.layout.bits} bits")
    lines = []
    for name, count in counts.items():
        of_decoded = name.partition(" ")[0] == DECODED
        widths = f" of {' and '.join(sorted(decoded))}; --backends says why" if of_decoded else ""
        lines.append(f"{name}: {counted(count, 'layer')}{widths}")
    return lines


def _show_backends(rows: list[Any]) -> None:
    """Print a row for each kind of layer, and below the table the reasons, by the numbers that the rows give."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column, justify in (("layers", "right"), ("name", "left"), ("in → out", "right"), ("bits", "right")):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("run by", no_wrap=True)
    table.add_column("not by", no_wrap=True)
    reasons: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: (row.names, row.layout.bits)):
        marks = []
        for name, reason in row.explanation.refusals.items():
            mark = reasons.setdefault(f"{name} {reason}", f"({len(reasons) + 1})")
            marks.append(f"{name} {mark}")
        shape = f"{row.layout.in_features} → {row.layout.out_features}"
        table.add_row(
            str(row.count),
            row.names,
            shape,
            row.layout.weights or str(row.layout.bits),
            row.explanation.label,
            ", ".join(marks),
        )
    console.print(table)
    for reason, mark in reasons.items():
        console.print(f"[dim]{mark} {escape(reason)}[/]")


def _error_table(linears: dict[str, dict[str, Any]]) -> Table:
    """Return a row per block, a column per kind of layer."""
    rows: dict[str, dict[str, Any]] = {}
    for path, entry in linears.items():
        block, name = block_and_rest(path)
        row, name = rows.setdefault(block, {}), NUMBER.sub(".", name)
        row[name] = _together(row[name], entry) if name in row else {**entry, "count": 1}
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


def _together(many: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    """Add an expert to those of its block: the mean error, all bytes."""
    count, error = many["count"] + 1, None
    if many["error"] is not None and one["error"] is not None:
        error = many["error"] + (one["error"] - many["error"]) / count
    return {"error": error, "bytes": many["bytes"] + one["bytes"], "count": count}


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
