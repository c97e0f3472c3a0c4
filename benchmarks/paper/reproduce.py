"""Reproduce a table or figure of the ParoQuant paper: quantize, evaluate, store the row, render the page.

    python benchmarks/paper/reproduce.py                       # what there is
    python benchmarks/paper/reproduce.py perplexity --model qwen3-1.7b-base [--recipe paper] [--dry-run]
    python benchmarks/paper/reproduce.py components            # on the embedded model
    python benchmarks/paper/reproduce.py page                  # README.md, from the results

A command whose output exists, and a row that is in benchmarks/results/paper, are not made again. Local models are told
apart by their directories' names: give another --work for another model of the same name.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pairquant.evaluation.results import read_results
from pairquant.support.errors import ConfigError, PairQuantError

sys.path.insert(0, str(Path(__file__).parents[1]))  # this folder as a package, and the benchmarks beside it
from embedded_model import gguf_file
from paper import rows
from paper.experiments import (
    EMBEDDED_FILE,
    EXPERIMENTS,
    MODELS,
    RECIPES,
    ROOT,
    Case,
    Experiment,
    model_named,
    named,
    numbers,
    plan,
)
from paper.page import PAGE, render

Execute = Callable[[Sequence[str]], None]


def execute(command: Sequence[str]) -> None:
    """Run a command as typed at the repository's root, with this Python and this Python's `pairquant`."""
    heads = {"python": [sys.executable], "pairquant": [sys.executable, "-m", "pairquant"]}
    subprocess.run([*heads[command[0]], *command[1:]], cwd=ROOT, check=True)


def embedded(command: Sequence[str]) -> tuple[str, ...]:
    """With the embedded model's file in its place."""
    if EMBEDDED_FILE not in command:
        return tuple(command)
    return tuple(str(gguf_file()) if part == EMBEDDED_FILE else part for part in command)


def from_root(path: Path) -> Path:
    """Where commands, which run at the repository's root, find it."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def announce(command: Sequence[str]) -> None:
    print(f"$ {shlex.join(command)}", flush=True)


def run_scripts(experiment: Experiment, dry: bool, run: Execute = execute) -> None:
    """The repository's own benchmarks; they keep their results, and those that skip finished rows do so."""
    for command in map(embedded, experiment.scripts):
        announce(command)
        if not dry:
            run(command)


def run_case(table: str, case: Case, dry: bool, results: Path = rows.RESULTS, run: Execute = execute) -> None:
    """All commands of a row, then the row."""
    if rows.exists(table, case, results):
        print(f"{table}, {case.name}, {case.recipe}: the row exists")
        return
    steps = plan(EXPERIMENTS[table], case)
    for step in steps:
        command = embedded(step.command)
        makes = ROOT / step.makes
        if makes.exists():
            print(f"exists: {step.makes}")
            continue
        announce(command)
        if not dry:
            (ROOT / case.folder).mkdir(parents=True, exist_ok=True)
            run(command)
    measured = [ROOT / step.makes for step in steps if step.measures]
    if dry or not measured:
        return
    found = [read_results(file) for file in measured]
    row = {
        **rows.key(case),
        "numbers": numbers(found),
        **{part: getattr(found[-1], part) for part in ("device", "versions")},
    }
    rows.append(table, {**row, "commands": [anywhere(step.command, case) for step in steps]}, results)
    print(f"{table}, {case.name}, {case.recipe}: {row['numbers']}")


def anywhere(command: Sequence[str], case: Case) -> str:
    """The command without what only this machine has."""
    text = shlex.join(command).replace(str(case.work), "WORK")
    return text if case.name in MODELS else text.replace(case.model.source, "MODEL")


def cases(table: str, model: str, recipes: Sequence[str], work: Path, calibration: Sequence[str]) -> list[Case]:
    """The rows asked for; raises `ConfigError` for names that there are not."""
    experiment = EXPERIMENTS[table]
    chosen = [named("recipe", recipe, RECIPES) for recipe in recipes] or list(experiment.recipes)
    published = [name for name in experiment.models if name != "embedded"]
    found = {name: MODELS[name] for name in published} if model == "all" else dict([model_named(model)])
    if "embedded" in found and "embedded" not in experiment.models:
        raise ConfigError(f"the embedded model has no rows in {table!r}, allowed: {', '.join(['all', *published])}")
    work = from_root(work)
    if model not in MODELS and model != "all":
        found = {name: replace(each, source=str(from_root(Path(each.source)))) for name, each in found.items()}
    return [Case(name, each, recipe, work, tuple(calibration)) for name, each in found.items() for recipe in chosen]


def reproduce(options: argparse.Namespace) -> None:
    table = named("table", options.table, [*EXPERIMENTS, "page"])
    if table == "page":
        PAGE.write_text(render())
        print(f"written: {PAGE}")
        return
    experiment = EXPERIMENTS[table]
    if experiment.scripts and options.model == "embedded":
        if options.recipe or options.calibration:
            raise ConfigError(
                f"--recipe and --calibration are for models, and {experiment.of} of {experiment.on} is measured by the "
                "repository's benchmarks, with recipes of their own. Leave them out, or name a --model."
            )
        run_scripts(experiment, options.dry_run)
    else:
        if experiment.steps is None:
            raise ConfigError(f"{experiment.of} is measured by the repository's benchmarks. Leave out --model.")
        for case in cases(table, options.model, options.recipe, options.work, options.calibration):
            run_case(table, case, options.dry_run)
    if not options.dry_run:
        PAGE.write_text(render())


def overview() -> str:
    lines = [f"{name:22} {each.of:16} {each.title}" for name, each in EXPERIMENTS.items()]
    return "\n".join(
        [*lines, f"{'page':22} {'':16} the page, from the results", "", f"models: all, {', '.join(MODELS)}"]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", help="a table's name, or page; none: the list")
    parser.add_argument("--model", default="embedded", help="a published model, a directory, a .gguf file, or all")
    parser.add_argument("--recipe", action="append", default=[], help="repeat for more; default: the table's")
    parser.add_argument(
        "--calibration", action="append", default=[], help="instead of the paper's text; repeat for more"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "paper-runs", help="where models and raw results go")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    options = parser.parse_args(arguments)
    if options.table is None:
        print(overview())
        return
    try:
        reproduce(options)
    except PairQuantError as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: the command ended with code {error.returncode}. Mend it, then run the same again.")


if __name__ == "__main__":
    main()
