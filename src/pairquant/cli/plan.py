"""`pairquant plan`, and how a plan is shown before work begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..support.formatting import counted, short_name, size
from .app import HelpAll, Model, app, console, option, quiet_libraries
from .display import JobBars, command_line
from .method_options import (
    CALIBRATION,
    CANDIDATES,
    METHOD,
    TARGET_BPW,
    TARGET_SIZE,
    Device,
    GroupSize,
    Rotations,
    Samples,
    Seed,
    Trust,
    config_of,
    wanted,
)

SIZE = "Size"
#: Most blocks that a row of the map of bits shows.
COLUMNS = 48
#: The style of each width in the map.
STYLES = {2: "red", 3: "yellow", 4: "green", 5: "cyan", 6: "blue", 8: "magenta"}
#: How many rotations, up to 16, as a character.
DIGITS = "·123456789abcdefg"


@app.command(epilog="Example: pairquant plan MODEL --target-bpw 3.5 --output plan.json")
def plan(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, option(SIZE, "File to write.")],
    target_bpw: Annotated[float | None, option(SIZE, TARGET_BPW)] = None,
    target_size: Annotated[str | None, option(SIZE, TARGET_SIZE)] = None,
    candidates: Annotated[str, option(SIZE, CANDIDATES)] = "bits:2|3|4|5|6|8",
    measured: Annotated[Path | None, option(SIZE, "An earlier plan, to use its measurements.")] = None,
    bits: Annotated[int, option(METHOD, "Bits of all layers, where no size is wanted.", rare=True)] = 4,
    group_size: GroupSize = "128",
    rotations: Rotations = "8",
    ignore: Annotated[
        list[str] | None, option(METHOD, "Layers to leave as they are; repeat.", metavar="PATTERN", rare=True)
    ] = None,
    override: Annotated[
        list[str] | None, option(METHOD, "Fix the form of some layers; the last wins.", metavar="PATTERN=…")
    ] = None,
    calibration: Annotated[list[str] | None, option(CALIBRATION, "Text to measure on; repeat.", metavar="TEXT")] = None,
    samples: Samples = 128,
    seq_len: Annotated[int, option(CALIBRATION, "Tokens per window.", rare=True)] = 2048,
    seed: Seed = 0,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    help_all: HelpAll = False,
) -> None:
    """Choose bits for each layer of MODEL, so that all together have the size you want and the output changes least.

    Every layer is tried in every form. Change the file if you like, then: quantize --plan.
    """
    from ..checkpoint.files import write_json
    from ..spec.mixed import MixedPlan
    from ..support.errors import ConfigError

    if not output.parent.is_dir():
        raise ConfigError(f"--output {str(output)!r}: there is no directory {str(output.parent)!r}. Create it first.")
    config = config_of(context.params, target=wanted(target_bpw, target_size))
    earlier = MixedPlan.read(measured) if measured else None
    quiet_libraries()
    from ..jobs.plan import plan as make

    with PlanBars() as progress:
        result = make(
            model, config, device=device, measured=earlier, trust_remote_code=trust_remote_code, progress=progress
        )
    write_json(output, result.plan.to_dict())
    trust = ["--trust-remote-code"] if trust_remote_code else []
    following = command_line("pairquant", "quantize", model, "--plan", output, "--output", "DIRECTORY", *trust)
    console.print(f"\nwritten to {escape(str(output))}\nNext: [bold]{escape(following)}[/]", soft_wrap=True)


class PlanBars(JobBars):
    """Shows how far the measurement is, and the plan that comes of it."""

    def measuring(self, blocks: int, finished: int) -> None:
        self.bars.update(self.task, description="measuring blocks", total=blocks, completed=finished)

    def planned(self, result: Any) -> None:
        for part in plan_shown(result):
            self.bars.console.print(part, soft_wrap=isinstance(part, str))


def plan_shown(result: Any) -> list[Any]:
    """Return a plan as tables and text: the forms and how many layers have each, and the bits of every block."""
    chosen = list(zip(result.choice.units, result.choice.forms, strict=True))
    total = sum(unit.weights for unit, _ in chosen)
    layers: Counter[Any] = Counter()
    weights: Counter[Any] = Counter()
    for unit, form in chosen:
        layers[form.spec] += len(unit.paths)
        weights[form.spec] += unit.weights
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("form")
    table.add_column("layers", justify="right")
    table.add_column("weights", justify="right")
    for spec in sorted(layers, key=lambda spec: (spec.bits, spec.group_size, spec.rotations)):
        table.add_row(str(spec), f"{layers[spec]:,}", f"{weights[spec] / total:.1%}")
    return [table, "", *_maps(chosen), "", _outcome(result)]


def _maps(chosen: list[tuple[Any, Any]]) -> list[Any]:
    """Return the bits of every block, and its rotations if they differ, in a row for each kind of layer."""
    rows: dict[str, dict[int, Any]] = {}
    for unit, form in chosen:
        block = next((int(part) for part in unit.paths[0].split(".") if part.isdecimal()), 0)
        names = dict.fromkeys("experts " + short_name(p) if unit.pool else short_name(p) for p in unit.paths)
        rows.setdefault(" ".join(names), {})[block] = form.spec
    tables = _map("bits", rows, lambda spec: (str(spec.bits), STYLES[spec.bits]))
    if len({form.spec.rotations for _, form in chosen}) > 1:
        tables += [
            "",
            *_map("rotations (· none)", rows, lambda spec: (DIGITS[spec.rotations], "" if spec.rotations else "dim")),
        ]
    return tables


def _map(title: str, rows: dict[str, dict[int, Any]], shown_as: Callable[[Any], tuple[str, str]]) -> list[Any]:
    """Return a character for every block, in a row for each kind of layer. shown_as: form → character and style."""
    blocks = sorted({block for row in rows.values() for block in row})
    tables = []
    for start in range(0, len(blocks), COLUMNS):
        some = blocks[start : start + COLUMNS]
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column(f"{title} of blocks {some[0]} to {some[-1]}")
        table.add_column("")
        for name, row in rows.items():
            line = Text()
            for block in some:
                line.append(*(shown_as(row[block]) if block in row else (" ", "")))
            table.add_row(name, line)
        tables.append(table)
    return tables


def _outcome(result: Any) -> str:
    """Say in a sentence what the plan comes to."""
    text = f"{result.bits_per_weight:.3f} bits per weight, {size(result.size_bytes)} in all"
    if result.target.rotated is not None:
        text += f", {result.choice.rotated} of {counted(len(result.choice.units), 'input')} rotated"
    uniform = result.uniform
    if uniform is None or not uniform.divergence:
        return text + "; one form for all layers would not fit"
    common = Counter(form.spec for form in uniform.forms).most_common(1)[0][0]
    ratio = result.choice.divergence / uniform.divergence
    bits = uniform.bits / sum(unit.weights for unit in uniform.units)
    return f"{text}; predicted change of the output: {ratio:.3g} × that of {common} for all, which take {bits:.3f} bits"
