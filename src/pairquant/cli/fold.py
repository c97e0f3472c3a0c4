"""`pairquant fold`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.markup import escape
from rich.table import Table

from .app import HelpAll, Model, app, console, option, quiet_libraries
from .display import JobBars, command_line, duration, percent

OUTPUT, METHOD, CALIBRATION, RUN = "Output", "Method", "Calibration", "Run"


@app.command(epilog="Example: pairquant fold MODEL --output MODEL-FOLDED")
def fold(
    model: Model,
    output: Annotated[Path, option(OUTPUT, "Directory to write.")],
    overwrite: Annotated[bool, option(OUTPUT, "Replace an existing output.", "--overwrite")] = False,
    bits: Annotated[int, option(METHOD, "Width that the weights will be rounded to.")] = 4,
    group_size: Annotated[str, option(METHOD, "Weights per scale, or auto.")] = "128",
    rotations: Annotated[int, option(METHOD, "Rotations K, 0 (scales alone) to 16.")] = 8,
    steps: Annotated[int, option(METHOD, "Steps of the fit.")] = 150,
    untie: Annotated[
        bool, option(METHOD, "Also where this parts the two embeddings, and adds to the size.", "--untie", rare=True)
    ] = False,
    pair_selection: Annotated[
        str, option(METHOD, "random, or magnitude: the most different first.", rare=True)
    ] = "random",
    ignore: Annotated[
        list[str] | None, option(METHOD, "Layers that will not be rounded; repeat.", metavar="PATTERN", rare=True)
    ] = None,
    calibration: Annotated[
        list[str] | None, option(CALIBRATION, "Text: a file, a data set, self; repeat.", metavar="TEXT")
    ] = None,
    samples: Annotated[int, option(CALIBRATION, "Windows of text.")] = 128,
    seq_len: Annotated[int, option(CALIBRATION, "Tokens per window.")] = 2048,
    device: Annotated[str, option(RUN, "auto, cpu, cuda, cuda:1, …")] = "auto",
    trust_remote_code: Annotated[bool, option(RUN, "Run the model's own Python code.", "--trust-remote-code")] = False,
    compute: Annotated[str, option(RUN, "Forward passes in auto, float32 or bfloat16.", rare=True)] = "auto",
    seed: Annotated[int, option(RUN, "Seed of pairs and windows.", rare=True)] = 0,
    help_all: HelpAll = False,
) -> None:
    """Write MODEL as an equal plain model that is easier to round, for any tool and format.

    Rotations and scales are folded into its weights: nothing of them runs. To quantize it here: quantize --transform none.
    """
    from dataclasses import replace

    from ..spec.options import QuantConfig
    from ..spec.recipe import PRESETS

    config = QuantConfig(
        bits=bits,
        group_size=int(group_size) if group_size.isdecimal() else group_size,  # type: ignore[arg-type]
        rotations=rotations,
        recipe=replace(PRESETS["fast"], steps=steps),
        pair_selection=pair_selection,
        ignore=(*QuantConfig.ignore, *(ignore or ())),
        calibration=tuple(calibration or ("default",)),
        samples=samples,
        seq_len=seq_len,
        compute=compute,
        seed=seed,
    )
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
