"""`pairquant quantize` and `pairquant presets`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .app import Device, Model, Trust, app, console, quiet_libraries
from .display import duration, plain, progress_bars, short_name, size


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option(help="Directory to write; must not exist.")],
    preset: Annotated[
        str, typer.Option(help="fast, best, paper, quick, or the baselines gptq and rtn; see `pairquant presets`.")
    ] = "fast",
    bits: Annotated[int, typer.Option(help="Bits per code: 2, 3, 4 or 8.")] = 4,
    group_size: Annotated[str, typer.Option(help="Weights per scale: 128, 64, 32, or auto.")] = "128",
    rotations: Annotated[int, typer.Option(help="Rotations K, 0 to 16.")] = 8,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Text or chats: .txt, .md, .jsonl, .json, .csv, .parquet, or a data set name; repeat for more. "
            "Default: bundled."
        ),
    ] = None,
    share_rotations: Annotated[bool, typer.Option(help="One transform for linears that read the same input.")] = False,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Leave these modules: a path, its end, or re:…; repeat for more.")
    ] = None,
    device: Device = "auto",
    validation: Annotated[
        list[str] | None,
        typer.Option(
            help="Text that chooses the best epoch of block-wise training. Default: windows of --calibration."
        ),
    ] = None,
    pair_selection: Annotated[str, typer.Option(help="random, or magnitude: the most different first.")] = "random",
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change the preset: NAME=VALUE, see `pairquant presets`; repeat for more."),
    ] = None,
    bos: Annotated[
        str, typer.Option(help="Begin windows of text with <bos>: auto as the tokenizer has it, never, or always.")
    ] = "auto",
    compute: Annotated[str, typer.Option(help="Forward passes in auto, float32 or bfloat16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of pairs and calibration windows.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of continuing a stopped run.")] = False,
    log_to: Annotated[str | None, typer.Option(help="Also log to tensorboard or wandb.")] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload the result to the Hugging Face hub as NAME or OWNER/NAME.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push-to-hub: a private repository.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Quantize MODEL into a checkpoint that Transformers, and every ParoQuant reader, loads.

    The same command continues a run that was stopped.

    torchrun --nproc-per-node N -m pairquant quantize … spreads it over N GPUs.
    """
    from ..spec.options import QuantConfig
    from ..spec.recipe import recipe_with
    from ..support.loggers import logger

    config = QuantConfig(
        preset=preset,
        bits=bits,
        group_size=int(group_size) if group_size.isdecimal() else group_size,  # type: ignore[arg-type]
        rotations=rotations,
        samples=samples,
        seq_len=seq_len,
        calibration=tuple(calibration or ("default",)),
        validation=tuple(validation or ()),
        pair_selection=pair_selection,
        compute=compute,
        bos=bos,
        recipe=recipe_with(preset, setting or []),
        share_rotations=share_rotations,
        ignore=(*QuantConfig.ignore, *(ignore or ())),
        seed=seed,
    )
    quiet_libraries()
    from ..jobs.quantize import quantize as run

    leads = os.environ.get("RANK", "0") == "0"
    if push_to_hub and leads:
        from ..hub.upload import require_writable

        push_to_hub = require_writable(push_to_hub, private)
    with logger(log_to, output) as log, _BlockProgress(leads) as progress:
        summary = run(
            model,
            output,
            config,
            device=device,
            overwrite=overwrite,
            fresh=fresh,
            trust_remote_code=trust_remote_code,
            progress=progress,
            log_to=log,
        )
    if not leads:
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("bits per weight", f"{summary.bits_per_weight:.2f} in the quantized layers")
    table.add_row("size", f"{size(summary.size_before)} → {size(summary.size_after)}")
    table.add_row("time", duration(summary.seconds))
    table.add_row("written to", str(summary.output))
    console.print(table)
    if push_to_hub:
        _push(summary.output, push_to_hub, private)
    console.print(f"\nNext: [bold]pairquant eval {summary.output} --reference {model}[/]", soft_wrap=True)


def _push(output: Path, name: str, private: bool) -> None:
    from ..hub.upload import push
    from ..support.errors import HubError

    try:
        with console.status(f"uploading {output}"):
            address = push(output, name, private=private)
    except HubError as error:
        again = f"pairquant push {output} {name}{' --private' if private else ''}"
        raise HubError(f"{error} The checkpoint stands; to try again: {again}") from error
    console.print(f"{output} is at {address}", soft_wrap=True)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Only this one.")] = None,
) -> None:
    """What each preset does, setting by setting: the names that `quantize --set` takes."""
    from ..spec.recipe import PRESETS, flat, preset_named

    chosen = {name: preset_named(name)} if name else PRESETS
    columns = {title: flat(recipe) for title, recipe in chosen.items()}
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("setting", no_wrap=True)
    for title in columns:
        table.add_column(title, justify="right")
    for key in dict.fromkeys(key for values in columns.values() for key in values):
        table.add_row(key, *(plain(values[key]) if key in values else "" for values in columns.values()))
    console.print(table)


class _BlockProgress:
    """Prints one line per finished block, and a bar with the time left below them."""

    def __init__(self, visible: bool = True) -> None:
        self.bars = progress_bars(visible)
        self.blocks = 0
        self.columns: list[str] = []

    def __enter__(self) -> _BlockProgress:
        self.bars.start()
        self.task = self.bars.add_task("reading model", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.update(self.task, visible=False)
        self.bars.stop()

    @staticmethod
    def width(name: str) -> int:
        return max(8, len(name) + 2)

    def stage(self, text: str) -> None:
        self.bars.update(self.task, description=text)

    def plan(self, blocks: int, linears: int, finished: int, memory: Any) -> None:
        self.blocks = blocks
        self.bars.console.print(
            f"{linears} linear layers in {blocks} blocks; predicted peak {size(memory.device)} of "
            f"{size(memory.available)} memory free on {memory.on}"
        )
        if finished:
            self.bars.console.print(f"continuing after block {finished}, which an earlier run finished")

    def notice(self, text: str) -> None:
        self.bars.console.print(f"[yellow]{escape(text)}[/]")

    def block(self, result: Any) -> None:
        errors = {short_name(path): error for path, error in result.errors.items()}
        if list(errors) != self.columns:
            self.columns = list(errors)
            heading = "".join(f"{name:>{self.width(name)}}" for name in self.columns)
            self.bars.console.print(f"[dim]relative error of each layer's output, %\nblock{heading}     time[/]")
            self.bars.reset(self.task, total=self.blocks, completed=result.index, description="quantizing")
        cells = "".join(f"{100 * error:{self.width(name)}.3f}" for name, error in errors.items())
        memory = f"  {size(result.gpu_peak)}" if result.gpu_peak else ""
        self.bars.console.print(f"{result.index + 1:5}{cells} {result.seconds:6.1f} s{memory}", soft_wrap=True)
        self.bars.update(self.task, completed=result.index + 1)
