"""`pairquant quantize` and `pairquant presets`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..formats.table import OWN
from ..support.formatting import counted
from .app import HelpAll, Model, app, console, option, quiet_libraries
from .display import command_line, duration, plain, short_name, size
from .method_options import (
    CALIBRATION,
    CANDIDATES,
    METHOD,
    OUTPUT,
    RUN,
    TARGET_BPW,
    TARGET_SIZE,
    Calibration,
    Compute,
    Device,
    GroupSize,
    Overwrite,
    PairSelection,
    Rotations,
    Samples,
    Seed,
    SeqLen,
    Trust,
    config_of,
    wanted,
)
from .plan import PlanBars

if TYPE_CHECKING:
    from ..jobs.quantize import QuantizationSummary


@app.command(epilog="Example: pairquant quantize MODEL --output MODEL-PARO --preset best")
def quantize(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, option(OUTPUT, "Directory to write, or .gguf file.")],
    form: Annotated[str, option(OUTPUT, "paroquant, awq, gptq, mlx, gguf, …", "--format")] = OWN,
    overwrite: Overwrite = False,
    push_to_hub: Annotated[str | None, option(OUTPUT, "Upload it as NAME or OWNER/NAME.", rare=True)] = None,
    private: Annotated[bool, option(OUTPUT, "Make the uploaded repository private.", "--private", rare=True)] = False,
    log_to: Annotated[str | None, option(OUTPUT, "Also log to tensorboard or wandb.", rare=True)] = None,
    preset: Annotated[str, option(METHOD, "See `pairquant presets`.")] = "fast",
    bits: Annotated[int, option(METHOD, "2, 3, 4, 5, 6 or 8 per weight.")] = 4,
    group_size: GroupSize = "128",
    symmetric: Annotated[bool, option(METHOD, "Codes without zero points.", "--symmetric", rare=True)] = False,
    target_bpw: Annotated[float | None, option(METHOD, TARGET_BPW)] = None,
    target_size: Annotated[str | None, option(METHOD, TARGET_SIZE, rare=True)] = None,
    candidates: Annotated[str, option(METHOD, CANDIDATES, rare=True)] = "bits:2|3|4|5|6|8",
    head_bits: Annotated[int | None, option(METHOD, "Quantize the output embedding too.")] = None,
    embedding_bits: Annotated[int | None, option(METHOD, "Quantize the input embedding too.", rare=True)] = None,
    plan: Annotated[Path | None, option(METHOD, "Forms of all layers, from `pairquant plan`.", metavar="FILE")] = None,
    transform: Annotated[str, option(METHOD, "rotated, folded or none.")] = "rotated",
    activations: Annotated[
        str | None, option(METHOD, "Round what layers read too: int8, fp8, int4 or mxfp4.", rare=True)
    ] = None,
    weights: Annotated[
        str | None, option(METHOD, "Round weights to mxfp4 instead of whole numbers.", rare=True)
    ] = None,
    rotations: Rotations = "8",
    share_rotations: Annotated[
        bool, option(METHOD, "Give linears that read the same input one transform.", "--share-rotations", rare=True)
    ] = False,
    pair_selection: PairSelection = "random",
    all_experts: Annotated[
        bool,
        option(METHOD, "Fit every expert on all tokens, whatever its router chooses.", "--all-experts", rare=True),
    ] = False,
    transform_per_expert: Annotated[
        bool,
        option(METHOD, "A transform for each expert; no kernel runs those.", "--transform-per-expert", rare=True),
    ] = False,
    end_to_end: Annotated[
        int, option(METHOD, "Epochs of a last training, of the whole quantized model.", metavar="N", rare=True)
    ] = 0,
    setting: Annotated[
        list[str] | None, option(METHOD, "Change the preset, NAME=VALUE; repeat for more.", "--set", rare=True)
    ] = None,
    ignore: Annotated[
        list[str] | None, option(METHOD, "Layers to leave as they are; repeat.", metavar="PATTERN")
    ] = None,
    override: Annotated[
        list[str] | None,
        option(METHOD, "Store some otherwise; the last wins.", metavar="PATTERN=…"),
    ] = None,
    calibration: Calibration = None,
    samples: Samples = 128,
    seq_len: SeqLen = 2048,
    bos: Annotated[
        str, option(CALIBRATION, "Begin windows with <bos>: auto as the tokenizer has it, never, always.", rare=True)
    ] = "auto",
    validation: Annotated[
        list[str] | None,
        option(CALIBRATION, "Text that chooses the best epoch. Default: windows of --calibration.", rare=True),
    ] = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    compute: Compute = "auto",
    seed: Seed = 0,
    fresh: Annotated[
        bool, option(RUN, "Start over instead of continuing a stopped run.", "--fresh", rare=True)
    ] = False,
    help_all: HelpAll = False,
) -> None:
    """Quantize MODEL for Transformers and vLLM, or with --format for other programs.

    The same command continues a run that was stopped.
    """
    from ..spec.recipe import recipe_with
    from ..support.loggers import logger

    _require_used(context, plan, target_bpw, target_size)
    _require_format(form, push_to_hub)
    _require_head(head_bits, ignore)
    config = config_of(
        context.params,
        recipe=recipe_with(preset, setting or [], end_to_end),
        target=wanted(target_bpw, target_size),
    )
    quiet_libraries()
    from ..jobs.other_formats import quantize_as as run

    leads = os.environ.get("RANK", "0") == "0"
    if push_to_hub and leads:
        from ..hub.upload import require_writable

        push_to_hub = require_writable(push_to_hub, private)
    with logger(log_to, output) as log, _BlockProgress(leads) as progress:
        summary = run(
            form, model, output, config, device=device, overwrite=overwrite, fresh=fresh,
            trust_remote_code=trust_remote_code, progress=progress, log_to=log,
        )  # fmt: skip
    if not leads:
        return
    console.print(_outcome(summary))
    if push_to_hub:
        _push(summary.output, push_to_hub, private)
    console.print(_following(form, model, summary.output, trust_remote_code), soft_wrap=True)


def _outcome(summary: QuantizationSummary) -> Table:
    """Return what came out, a row for each number."""
    config = summary.config
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    embeddings = {"output embedding": config.head_bits, "input embedding": config.embedding_bits}
    among = " and ".join(f"the {name}" for name, given in embeddings.items() if given is not None)
    included = f", {among} among them" if among else ""
    table.add_row("bits per weight", f"{summary.bits_per_weight:.2f} in the quantized layers{included}")
    if config.weights is not None:
        table.add_row("weights", f"{config.weights}; pairquant inspect says what runs them here")
    if config.activations is not None:
        table.add_row("activations", f"{config.activations}, dynamic; pairquant inspect says what runs them here")
    table.add_row("size", f"{size(summary.size_before)} → {size(summary.size_after)}")
    table.add_row("time", duration(summary.seconds))
    table.add_row("written to", escape(str(summary.output)))
    return table


def _following(form: str, model: str, output: Path, trust_remote_code: bool) -> str:
    """Return what to do next with a checkpoint, as marked up text."""
    if form != OWN:
        from ..formats.table import FORMATS

        command = FORMATS[form].command.format(output)
        return f"\nRead by {FORMATS[form].readers}. Next: [bold]{escape(command)}[/]"
    trust = ["--trust-remote-code"] if trust_remote_code else []
    command = command_line("pairquant", "eval", output, "--reference", model, *trust)
    return f"\nNext: [bold]{escape(command)}[/]"


def _require_used(context: typer.Context, plan: Path | None, *targets: float | str | None) -> None:
    """Refuse options that would have no effect, because a plan or a target decides what they are about."""
    from ..support.errors import ConfigError

    decided = {"bits": "--plan", "group_size": "--plan", "rotations": "--plan"} if plan else {}
    if any(target is not None for target in targets):
        decided["bits"] = "a target size"
    given = {name for name in context.params if getattr(context.get_parameter_source(name), "name", "") != "DEFAULT"}
    for name, by in decided.items():
        if name in given:
            remedy = "--override changes single layers" if plan else "--candidates limits the bits to choose from"
            typed = name.replace("_", "-")
            raise ConfigError(f"--{typed} has no effect beside {by}, which decides it. Leave it out; {remedy}.")
    if "rotations" in given and context.params["transform"] == "none":
        raise ConfigError("--rotations has no effect with --transform none. Leave one of them out.")
    auto = context.params["rotations"] == "auto"
    if "candidates" in given and not auto and not any(target is not None for target in targets):
        raise ConfigError(
            "--candidates has no effect without --target-bpw, --target-size or --rotations auto. Add one of them."
        )


def _require_format(form: str, push_to_hub: str | None) -> None:
    """Refuse options that a format of another program cannot have."""
    from ..support.errors import ConfigError

    if form == OWN:
        return
    if push_to_hub:
        raise ConfigError(
            f"--push-to-hub uploads checkpoints of our own format. Upload {form} with huggingface_hub's `hf upload`."
        )


def _require_head(head_bits: int | None, ignore: list[str] | None) -> None:
    """Refuse to quantize the output embedding and to leave it as it is."""
    from ..support.errors import ConfigError

    if head_bits is not None and "lm_head" in (ignore or ()):
        raise ConfigError(
            "--head-bits quantizes the output embedding, and --ignore lm_head leaves it. Leave one of them out."
        )


def _push(output: Path, name: str, private: bool) -> None:
    from ..hub.upload import push
    from ..support.errors import HubError

    try:
        with console.status(f"uploading {output}"):
            address = push(output, name, private=private)
    except HubError as error:
        again = command_line("pairquant", "push", output, name, *(["--private"] if private else []))
        raise HubError(f"{error} The checkpoint stands; to try again: {again}") from error
    console.print(f"{output} is at {address}", soft_wrap=True)


@app.command(epilog="Example: pairquant presets best")
def presets(
    name: Annotated[str | None, typer.Argument(help="Show only this one.")] = None,
) -> None:
    """Show what each preset does, setting by setting, by the names that `quantize --set` takes."""
    from ..spec.recipe import PRESETS, flat, preset_named

    chosen = {name: preset_named(name)} if name else PRESETS
    columns = {title: flat(recipe) for title, recipe in chosen.items()}
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("setting", no_wrap=True)
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for key in dict.fromkeys(key for values in columns.values() for key in values):
        table.add_row(key, *(_short(values[key]) if key in values else "" for values in columns.values()))
    console.print(table)
    ranges = {plain(recipe.shrinks): title for title, recipe in chosen.items() if len(recipe.shrinks) > 1}
    for values, title in ranges.items():
        console.print(f"[dim]shrinks of {title}: {values}[/]")


def _short(value: Any) -> str:
    """Return a setting in a narrow column: a list by its length."""
    return f"({len(value)})" if isinstance(value, tuple) and len(value) > 1 else plain(value)


class _BlockProgress(PlanBars):
    """Prints one line per finished block, and a bar with the time left below them."""

    def __init__(self, visible: bool = True) -> None:
        super().__init__(visible)
        self.blocks = 0
        self.columns: list[str] = []

    @staticmethod
    def width(name: str) -> int:
        return max(8, len(name) + 2)

    def plan(self, blocks: int, linears: int, finished: int, memory: Any) -> None:
        self.blocks = blocks
        self.bars.reset(self.task, total=blocks, completed=finished, description=f"block {finished}")
        self.bars.console.print(
            f"{counted(linears, 'linear layer')}; predicted peak {size(memory.device)} of {size(memory.available)} memory "
            f"free on {memory.on}"
        )
        if finished:
            self.bars.console.print(f"continuing with block {finished}: an earlier run finished those before it")

    def block(self, result: Any) -> None:
        by_name: dict[str, list[float]] = {}
        for path, error in result.errors.items():
            by_name.setdefault(short_name(path), []).append(error)
        errors = {name: sum(each) / len(each) for name, each in by_name.items()}  # the mean of many experts
        if list(errors) != self.columns:
            self.columns = list(errors)
            heading = "".join(f"{name:>{self.width(name)}}" for name in self.columns)
            self.bars.console.print(f"[dim]relative error of each layer's output, %\nblock{heading}     time[/]")
        cells = "".join(f"{100 * error:{self.width(name)}.3f}" for name, error in errors.items())
        memory = f"  {size(result.gpu_peak)}" if result.gpu_peak else ""
        name = result.index if result.path.rpartition(".")[2].isdecimal() else "head"
        self.bars.console.print(f"{name:>5}{cells} {result.seconds:6.1f} s{memory}", soft_wrap=True)
        following = f"block {result.index + 1}" if result.index + 1 < self.blocks else "finishing"
        self.bars.update(self.task, completed=result.index + 1, description=following)

    def trained(self, epoch: int, epochs: int, divergence: float) -> None:
        if epoch == 0:
            self.bars.console.print("[dim]training of the whole model: KL to the original on text held out[/]")
        self.bars.console.print(f"epoch {epoch:>2}  {divergence:.4f}")
        following = f"epoch {epoch + 1}" if epoch < epochs else "finishing"
        self.bars.reset(self.task, total=epochs, completed=epoch, description=following)
