"""`pairquant fold`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .app import HelpAll, Model, app, console, option, quiet_libraries
from .display import JobBars, command_line, duration, percent
from .method_options import (
    METHOD,
    OUTPUT,
    Calibration,
    Compute,
    Device,
    GroupSize,
    Overwrite,
    PairSelection,
    Samples,
    Seed,
    SeqLen,
    Trust,
    config_of,
)


@app.command(epilog="Example: pairquant fold MODEL --output MODEL-FOLDED")
def fold(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, option(OUTPUT, "Directory to write.")],
    overwrite: Overwrite = False,
    bits: Annotated[int, option(METHOD, "Width that the weights will be rounded to.")] = 4,
    group_size: GroupSize = "128",
    rotations: Annotated[int, option(METHOD, "Rotations K, 0 (scales alone) to 16.")] = 8,
    steps: Annotated[int, option(METHOD, "Steps of the fit.")] = 150,
    untie: Annotated[
        bool, option(METHOD, "Also where this parts the two embeddings, and adds to the size.", "--untie", rare=True)
    ] = False,
    pair_selection: PairSelection = "random",
    ignore: Annotated[
        list[str] | None, option(METHOD, "Layers that will not be rounded; repeat.", metavar="PATTERN", rare=True)
    ] = None,
    calibration: Calibration = None,
    samples: Samples = 128,
    seq_len: SeqLen = 2048,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    compute: Compute = "auto",
    seed: Seed = 0,
    help_all: HelpAll = False,
) -> None:
    """Write MODEL as an equal plain model that is easier to round, for any tool and format.

    Rotations and scales are folded into its weights: nothing of them runs. To quantize it here: quantize --transform none.
    """
    from dataclasses import replace

    from ..spec.recipe import PRESETS

    config = config_of(context.params, recipe=replace(PRESETS["fast"], steps=steps))
    quiet_libraries()
    from ..jobs.fold import fold as run

    with JobBars() as progress:
        summary = run(
            model,
            output,
            config,
            device=device,
            overwrite=overwrite,
            untie=untie,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("rotation of the stream", "folded" if summary.rotated else "none")
    if summary.errors is not None:
        table.add_row("error of its readers", " → ".join(f"{percent(error)} %" for error in summary.errors))
    table.add_row("time", duration(summary.seconds))
    table.add_row("written to", escape(str(output)))
    console.print(table)
    following = command_line(
        "pairquant",
        "quantize",
        output,
        "--transform",
        "none",
        "--bits",
        str(bits),
        "--group-size",
        group_size,
        "--output",
        "DIRECTORY",
        *(["--trust-remote-code"] if trust_remote_code else []),
    )
    console.print(f"\nNext: [bold]{escape(following)}[/]", soft_wrap=True)
