"""The table of `pairquant bench`, and its help."""

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pairquant.cli.app import app
from pairquant.cli.bench import _conditions, _table


def entry(name, compiled=False):
    row = {"batch": 2, "prefill_tokens_per_s": 1234.56, "decode_tokens_per_s": 20.0, "first_token_s": 0.05}
    return {
        "name": name, "size_bytes": 2.5e9, "load_s": 1.5, "peak_memory_bytes": None, "compiled": compiled, "rows": [row],
        "dtype": "bfloat16",
    }  # fmt: skip


def shown(model, reference=None):
    ratios = {**entry(""), "size_bytes": 0.5, "load_s": 1.0} if reference else None
    console = Console(width=120, file=io.StringIO())
    console.print(_table({"model": model, "reference": reference, "ratios": ratios}))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ("q4", "source", ["q4", "source"]),
        ("/models/q4", "/models/source", ["q4", "source"]),
        ("a/base", "b/base", ["a/base", "b/base"]),
        ("base", "b/base", ["base", "b/base"]),
    ],
)
def test_models_of_one_last_name_are_told_apart(first, second, names):
    assert shown(entry(first), entry(second))[0].split() == [*names, "ratio"]


def test_one_model_has_no_ratio_and_unknown_numbers_a_dash():
    lines = shown(entry("q4"))
    assert lines[0].split() == ["q4"]
    cells = {" ".join(line.split()[:-1]): line.split()[-1] for line in lines[1:]}
    assert cells["peak memory"] == "–"
    assert cells["batch 2: prefill, tokens/s"] == "1,234.6"


def test_what_ran_compiled_is_told():
    assert shown(entry("q4"), entry("source", compiled=True))[-1].split() == ["compiled", "no", "yes"]


def test_conditions_name_the_workload_the_engine_and_the_machine():
    workload = {"prompt_tokens": 16, "new_tokens": 6, "repeats": 2}
    results = {
        "workload": workload,
        "model": entry("q4"),
        "engine": "vllm",
        "versions": {"vllm": "1.0"},
        "device": "CPU",
    }
    assert _conditions(results) == "16 + 6 tokens, median of 2; vllm 1.0, bfloat16; CPU"


def test_help_has_groups_and_an_example():
    shown = CliRunner().invoke(app, ["bench", "--help"]).output
    assert all(part in shown for part in ("Engine", "Workload", "Output", "Example: pairquant bench"))
