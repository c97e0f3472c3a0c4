"""Implements `pairquant bench`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from rich.markup import escape
from rich.table import Table

from ..support.formatting import distinct_ends
from .app import HelpAll, Model, app, console, option, quiet_libraries
from .display import duration, require_place, size
from .engine_options import ENGINE, Device, Dtype, EngineName, Trust

WORK = "Workload"
OUTPUT = "Output"


@app.command(epilog="Example: pairquant bench MODEL-PARO --reference MODEL --batch 1 --batch 8 --json bench.json")
def bench(
    model: Model,
    reference: Annotated[str | None, option(WORK, "The original, to measure in the same way.")] = None,
    batch: Annotated[list[int] | None, option(WORK, "Sequences at once; repeat for more. Default: 1.")] = None,
    prompt_tokens: Annotated[int, option(WORK, "Tokens of each prompt.")] = 512,
    new_tokens: Annotated[int, option(WORK, "Tokens generated after it.")] = 128,
    repeats: Annotated[int, option(WORK, "Runs after a warm-up; medians are shown.", rare=True)] = 3,
    seed: Annotated[int, option(WORK, "Seed of the random prompts.", rare=True)] = 0,
    json_file: Annotated[Path | None, option(OUTPUT, "Write the results to this file.", "--json")] = None,
    compile: Annotated[
        bool | None,
        option(
            ENGINE,
            "Use torch.compile, or not. Default: only with vLLM on a GPU.",
            "--compile/--no-compile",
            rare=True,
        ),
    ] = None,
    engine: EngineName = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    help_all: HelpAll = False,
) -> None:
    """Measure speed and memory of MODEL, and of the original beside it."""
    quiet_libraries()
    from ..evaluation.speed import Workload
    from ..jobs.bench import bench as run
    from ..jobs.inspect import simulated

    require_place(json_file)
    with console.status("looking at the model") as status:
        results = run(
            model,
            reference,
            Workload(tuple(batch or (1,)), prompt_tokens, new_tokens, repeats, seed),
            engine=engine,
            device=device,
            dtype=dtype,
            compile=compile,
            trust_remote_code=trust_remote_code,
            on_stage=lambda stage: status.update(escape(stage)),
        )
    console.print(_table(results))
    console.print(f"[dim]{escape(_conditions(results))}[/]", soft_wrap=True)
    if (activations := simulated(model, device, dtype)) is not None:
        console.print(
            f"[dim]{activations} activations are simulated on this machine: rounded, but multiplied in 16 or 32 bits[/]"
        )
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")


def _table(results: dict[str, Any]) -> Table:
    """Return a row for each number, with a column for each model and one for their ratio."""
    models = [entry for entry in (results["model"], results["reference"]) if entry]
    table = Table("", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in distinct_ends([Path(entry["name"]) for entry in models]):
        table.add_column(escape(name), justify="right", no_wrap=True)
    if results["ratios"]:
        table.add_column("ratio", justify="right")
    for name, show, values in _lines([*models, results["ratios"]] if results["ratios"] else models):
        shows = [show] * len(models) + ["{:.2f}".format]
        table.add_row(
            name, *("–" if value is None else as_text(value) for as_text, value in zip(shows, values, strict=False))
        )
    if any(entry["compiled"] for entry in models):  # Transformers may compile one and not the other
        table.add_row("compiled", *("yes" if entry["compiled"] else "no" for entry in models))
    return table


def _lines(entries: list[dict[str, Any]]) -> Iterator[tuple[str, Callable[[float], str], list[float | None]]]:
    """Yield each number's name, how to show it, and its value for each entry."""
    sizes = {"size on disk": "size_bytes", "peak memory": "peak_memory_bytes"}
    for name, key in sizes.items():
        yield name, size, [entry[key] for entry in entries]
    yield "loaded in", duration, [entry["load_s"] for entry in entries]
    speeds = {"prefill, tokens/s": "prefill_tokens_per_s", "decode, tokens/s": "decode_tokens_per_s"}
    for rows in zip(*(entry["rows"] for entry in entries), strict=True):
        batch = f"batch {rows[0]['batch']}: "
        for name, key in speeds.items():
            yield batch + name, "{:,.1f}".format, [row[key] for row in rows]
        yield batch + "first token", lambda s: f"{1000 * s:,.0f} ms", [row["first_token_s"] for row in rows]


def _conditions(results: dict[str, Any]) -> str:
    """Return one line on what was measured, with what and where."""
    work, entry = results["workload"], results["model"]
    versions = results["versions"]
    return (
        f"{work['prompt_tokens']} + {work['new_tokens']} tokens, median of {work['repeats']}; {results['engine']} "
        f"{versions[results['engine']]}, {entry['dtype']}; {results['device']}"
    )
