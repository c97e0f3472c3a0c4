"""`pairquant export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Model, app, console, quiet_libraries
from .display import progress_bars, size


@app.command(epilog="Example: pairquant export MODEL-PARO --output MODEL-BF16")
def export(
    model: Model,
    output: Annotated[Path, typer.Option(help="Directory to write; must not exist.")],
    to: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Write quantized MODEL as a plain model, for engines that know nothing of rotations. It is large again."""
    quiet_libraries()
    from ..checkpoint.export import export as run

    with progress_bars() as bars:

        def on_tensors(count: int):
            task = bars.add_task("writing tensors", total=count)
            return lambda: bars.advance(task)

        run(model, output, to, overwrite=overwrite, on_tensors=on_tensors)
    written = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    console.print(f"{size(written)} in {to} written to {output}", soft_wrap=True)
