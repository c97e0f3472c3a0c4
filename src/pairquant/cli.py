"""The command line: quantize, presets, eval, chat, inspect, tune. Each verb is one call into the package, and printing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import __version__
from .errors import PairQuantError

app = typer.Typer(
    help="4-bit language models by scaled pairwise rotation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)
problems = Console(stderr=True, highlight=False)

Model = Annotated[str, typer.Argument(help="A model directory, a hub name, or a .gguf file.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]


def main() -> None:
    """Entry point: mendable errors are printed without a traceback."""
    try:
        app()
    except PairQuantError as error:
        problems.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        problems.print("\nstopped; the same command continues a quantization that has finished blocks")
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(f"pairquant {__version__}")
        raise typer.Exit


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
        typer.Option(help="Text: .txt, .jsonl, .parquet, or a data set name; repeat for more. Default: bundled."),
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
    compute: Annotated[str, typer.Option(help="Forward passes in auto, float32 or bfloat16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of pairs and calibration windows.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of continuing a stopped run.")] = False,
    log_to: Annotated[str | None, typer.Option(help="Also log to tensorboard or wandb.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Quantize MODEL into a checkpoint that Transformers, and every ParoQuant reader, loads.

    The same command continues a run that was stopped.

    torchrun --nproc-per-node N -m pairquant quantize … spreads it over N GPUs.
    """
    from .config import QuantConfig, recipe_with
    from .loggers import logger

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
        recipe=recipe_with(preset, setting or []),
        share_rotations=share_rotations,
        ignore=(*QuantConfig.ignore, *(ignore or ())),
        seed=seed,
    )
    _quiet_libraries()
    from .pipeline import quantize as run

    with logger(log_to, output) as log, _BlockProgress(leads := os.environ.get("RANK", "0") == "0") as progress:
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
    table.add_row("size", f"{_size(summary.size_before)} → {_size(summary.size_after)}")
    table.add_row("time", _duration(summary.seconds))
    table.add_row("written to", str(summary.output))
    console.print(table)
    console.print(f"\nNext: [bold]pairquant eval {summary.output} --reference {model}[/]", soft_wrap=True)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Only this one.")] = None,
) -> None:
    """What each preset does, setting by setting: the names that `quantize --set` takes."""
    from .config import PRESETS, flat, preset_named

    chosen = {name: preset_named(name)} if name else PRESETS
    columns = {title: flat(recipe) for title, recipe in chosen.items()}
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("setting", no_wrap=True)
    for title in columns:
        table.add_column(title, justify="right")
    for key in dict.fromkeys(key for values in columns.values() for key in values):
        table.add_row(key, *(_plain(values[key]) if key in values else "" for values in columns.values()))
    console.print(table)


@app.command(name="eval")
def evaluate(
    model: Model,
    reference: Annotated[str | None, typer.Option(help="The original model, for KL and agreement.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Text to evaluate on; repeat for more. Default: GSM8K test problems.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    max_tokens: Annotated[int | None, typer.Option(help="Use at most this many tokens of each text.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Perplexity of MODEL, and its divergence from the original."""
    _quiet_libraries()
    from .verbs import evaluate as run

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise typer.BadParameter(f"no such directory: {json_file.absolute().parent}", param_hint="--json")
    with _bars() as bars:

        def on_windows(name: str, count: int):
            task = bars.add_task(name, total=count)
            return lambda: bars.advance(task)

        results = run(
            model,
            reference,
            text or (),
            seq_len=seq_len,
            max_tokens=max_tokens,
            device=device,
            trust_remote_code=trust_remote_code,
            on_windows=on_windows,
        )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("text", "tokens", "perplexity", "KL", "top-1 kept"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for name, row in results["texts"].items():
        table.add_row(
            name, f"{row['tokens']:,}", f"{row['perplexity']:.3f}", _number(row["kl"], 4), _number(row["top1"], 4)
        )
    console.print(table)
    console.print(f"{results['bits_per_weight']:.2f} bits per weight, on {results['device']}")
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")


@app.command()
def chat(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="Answer this and exit.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Talk to MODEL; the answer appears as it is generated."""
    _quiet_libraries()
    from transformers import TextStreamer

    from .checkpoint.read import ModelFiles
    from .devices import resolve_device
    from .verbs import load

    target = resolve_device(device)
    files = ModelFiles.find(model, trust_remote_code)
    tokenizer = files.tokenizer()
    network = load(files, target)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    history: list[dict[str, str]] = []
    if prompt is None:
        console.print("[dim]An empty line or Ctrl-D ends the chat.[/]")
    while question := prompt if prompt is not None else _ask():
        history.append({"role": "user", "content": question})
        inputs = _chat_inputs(tokenizer, history).to(target)
        tokens = network.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, do_sample=False)
        answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        history.append({"role": "assistant", "content": answer})
        if prompt is not None:
            break


@app.command()
def inspect(
    model: Model,
    linear: Annotated[str | None, typer.Option(help="Follow this layer's weight step by step.")] = None,
) -> None:
    """What a checkpoint holds; every stored tensor is checked."""
    _quiet_libraries()
    from . import verbs

    if linear is not None:
        steps, remark = verbs.trace(model, linear)
        console.print(_life_table(linear, steps))
        console.print(f"[dim]spread: max|w| / rms; error: relative to the original. {escape(remark)}[/]")
        return
    found = verbs.inspect(model)
    config, report = found.checkpoint.config, found.checkpoint.report
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    provenance = config.provenance or {}
    shared = f", {len(config.shared_rotations)} shared transforms" if config.shared_rotations else ""
    table.add_row("format", f"{config.bits} bits, groups of {config.group_size}, {config.rotations} rotations{shared}")
    table.add_row(
        "bits per weight", f"{found.checkpoint.bits_per_weight():.2f} in {len(found.linears)} quantized layers"
    )
    table.add_row("size", _size(found.size))
    for key in ("tool", "source", "preset", "seed", "calibration", "calibration_tokens", "calibration_sha256"):
        if key in provenance:
            table.add_row(key.replace("_", " "), escape(_plain(provenance[key])))
    if "seconds" in report:
        table.add_row("quantized in", _duration(report["seconds"]))
    console.print(table)
    console.print(_error_table(found.linears))
    console.print("[dim]% relative error of each layer's output on the calibration text; all tensors checked[/]")


@app.command()
def tune(model: Model, device: Device = "auto") -> None:
    """Measure the kernels' tiles for the shapes of a checkpoint on this GPU; they are used from then on."""
    _quiet_libraries()
    from . import verbs
    from .devices import resolve_device
    from .kernels import ops, table

    rows = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("linears", "in", *(f"≤ {tokens} tokens" for tokens in table.TOKENS)):
        rows.add_column(column, justify="right", no_wrap=True)
    with console.status("measuring"):
        for sizes, channels, choices in verbs.tune(model, device):
            tiles = (f"{type(choice).__name__.lower()} {choice.rows}" for choice in choices.values())
            rows.add_row("+".join(map(str, sizes)), str(channels), *tiles)
    console.print(rows)
    console.print(f"kept in {escape(str(table.user_path(ops.device_class(resolve_device(device)))))}")


class _BlockProgress:
    """Prints one line per finished block, and a bar with the time left below them."""

    def __init__(self, visible: bool = True) -> None:
        self.bars = _bars(visible)
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
            f"{linears} linear layers in {blocks} blocks; predicted peak {_size(memory.device)} of "
            f"{_size(memory.available)} memory free on {memory.on}"
        )
        if finished:
            self.bars.console.print(f"continuing after block {finished}, which an earlier run finished")

    def notice(self, text: str) -> None:
        self.bars.console.print(f"[yellow]{escape(text)}[/]")

    def block(self, result: Any) -> None:
        errors = {_short(path): error for path, error in result.errors.items()}
        if list(errors) != self.columns:
            self.columns = list(errors)
            heading = "".join(f"{name:>{self.width(name)}}" for name in self.columns)
            self.bars.console.print(f"[dim]relative error of each layer's output, %\nblock{heading}     time[/]")
            self.bars.reset(self.task, total=self.blocks, completed=result.index, description="quantizing")
        cells = "".join(f"{100 * error:{self.width(name)}.3f}" for name, error in errors.items())
        memory = f"  {_size(result.gpu_peak)}" if result.gpu_peak else ""
        self.bars.console.print(f"{result.index + 1:5}{cells} {result.seconds:6.1f} s{memory}", soft_wrap=True)
        self.bars.update(self.task, completed=result.index + 1)


def _bars(visible: bool = True) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console if visible else Console(quiet=True),
        transient=True,
    )


def _error_table(linears: dict[str, dict[str, Any]]) -> Table:
    """A row per block, a column per kind of layer."""
    rows: dict[str, dict[str, Any]] = {}
    for path, entry in linears.items():
        block, name = _block_and_rest(path)
        rows.setdefault(block, {})[name] = entry
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("block", no_wrap=True)
    for name in columns:
        table.add_column(_short(name), justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    for block, row in rows.items():
        cells = [_percent(row[name]["error"]) if name in row else "" for name in columns]
        table.add_row(block, *cells, _size(sum(entry["bytes"] for entry in row.values())))
    return table


def _block_and_rest(path: str) -> tuple[str, str]:
    """ "model.layers.3.mlp.up_proj" → "3", "mlp.up_proj"."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return ("", path) if number is None else (parts[number], ".".join(parts[number + 1 :]))


def _short(path: str) -> str:
    """ "model.layers.3.mlp.up_proj" → "up"."""
    return path.rpartition(".")[2].removesuffix("_proj")


def _life_table(linear: str, steps: list[Any]) -> Table:
    table = Table(title=linear, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column, justify in (("step", "left"), ("tensor", "left"), ("dtype", "left"), ("shape", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("spread", justify="right")
    table.add_column("error", justify="right")
    for step in steps:
        shape = " × ".join(map(str, step.shape))
        table.add_row(step.name, step.tensor, step.dtype, shape, _number(step.spread, 1), _scientific(step.error))
    return table


def _chat_inputs(tokenizer, history: list[dict[str, str]]):
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(history, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return tokenizer("\n".join(turn["content"] for turn in history), return_tensors="pt")


def _ask() -> str:
    try:
        return console.input("[bold]> [/]").strip()
    except EOFError:
        return ""


def _quiet_libraries() -> None:
    """Transformers' own bars and notices would tear ours apart; its errors still come through."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3f}"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
