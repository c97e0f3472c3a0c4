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
    output: Annotated[Path, typer.Option(help="Directory, or .gguf file, to write; must not exist.")],
    to: Annotated[str, typer.Option(help="bf16, fp16, fp32; awq, gptq, compressed-tensors, mlx, gguf.")] = "bf16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Write quantized MODEL for programs that know nothing of rotations.

    As a plain model, bf16, fp16 or fp32, it is large again. The other formats hold what was quantized without transforms, as
    it is: see `pairquant quantize --format`.
    """
    quiet_libraries()
    from ..checkpoint.export import export as run

    with progress_bars() as bars:

        def on_tensors(count: int):
            task = bars.add_task("writing tensors", total=count)
            return lambda: bars.advance(task)

        run(model, output, to, overwrite=overwrite, on_tensors=on_tensors)
    written = sum(file.stat().st_size for file in ([output] if output.is_file() else output.glob("*.safetensors")))
    console.print(f"{size(written)} in {to} written to {output}", soft_wrap=True)
