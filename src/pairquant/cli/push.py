"""`pairquant push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, console, quiet_libraries


@app.command(epilog="Example: pairquant push MODEL-PARO OWNER/MODEL-PARO --results eval.json")
def push(
    model: Annotated[Path, typer.Argument(help="A directory that `quantize` has written.")],
    name: Annotated[str, typer.Argument(help="NAME or OWNER/NAME on the hub; made if it does not exist.")],
    results: Annotated[
        Path | None, typer.Option(help="What `pairquant eval --json` has written, for the model card.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub name of the original. Default: the source, if it came from the hub.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Default: the original's, if it is on the hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
) -> None:
    """Upload checkpoint MODEL to the Hugging Face hub as NAME, with a model card (README.md, rendered unless it is yours)."""
    quiet_libraries()
    from ..hub.upload import push as run

    with console.status(f"uploading {model}"):
        address = run(model, name, private=private, results=results, base_model=base_model, license=license)
    console.print(f"{model} is at {address}", soft_wrap=True)
