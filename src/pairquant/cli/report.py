"""`pairquant report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, console, quiet_libraries
from .display import progress_bars, size


@app.command(epilog="Example: pairquant report MODEL-PARO --eval eval.json --output report.html")
def report(
    models: Annotated[list[str], typer.Argument(help="Quantized model directories, shown side by side.")],
    results: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="What `pairquant eval`, `compare` or `bench --json` has written; repeat for more."),
    ] = None,
    output: Annotated[Path, typer.Option(help="The page; one of that name is replaced.")] = Path("report.html"),
    figures: Annotated[
        Path | None, typer.Option(help="Also write the figures as SVG and PNG into this directory (needs Chromium).")
    ] = None,
    linear: Annotated[
        str | None, typer.Option(help="The layer whose weight is shown. Default: the one of the strongest outliers.")
    ] = None,
) -> None:
    """Write one HTML page about quantized MODELS: errors, weights before and after the transform, times, results."""
    quiet_libraries()
    from ..report.page import write_report

    with progress_bars() as bars:

        def on_linears(name: str, count: int):
            task = bars.add_task(name, total=count)
            return lambda: bars.advance(task)

        write_report(models, output, results=results or (), linear=linear, figures=figures, on_linears=on_linears)
    console.print(f"{output} written, {size(output.stat().st_size)}: open it in a browser", soft_wrap=True)
    if figures is not None:
        console.print(f"figures as SVG and PNG in {figures}", soft_wrap=True)
