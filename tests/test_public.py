"""The public names of the package."""

import subprocess
import sys

import pytest

import pairquant


@pytest.mark.parametrize("name", pairquant.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(pairquant, name)
    assert value.__doc__
    assert callable(value) or name == "PRESETS"


def test_the_main_job_s_names_are_public():
    assert {"quantize", "evaluate", "export", "QuantConfig", "Recipe", "PairQuantError"} <= set(pairquant.__all__)
    assert set(pairquant.PRESETS) >= {"quick", "fast", "best", "paper", "rtn"}


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pairquant' has no attribute 'quantise'"):
        _ = pairquant.quantise


def test_what_type_checkers_see_is_what_is_loaded():
    import ast
    from pathlib import Path

    tree = ast.parse(Path(pairquant.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {(alias.asname, node.module) for node in block.body for alias in node.names}
    assert seen == set(pairquant._HOME.items())


def test_importing_the_package_imports_no_heavy_library():
    heavy = {"torch", "transformers", "numpy", "safetensors", "rich", "typer", "peft", "vllm"}
    code = f"import sys, pairquant; pairquant.PairQuantError; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
