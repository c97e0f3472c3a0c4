"""The import rule: imports point to a lower floor or stay inside the same folder; heavy libraries have one door each."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "pairquant"
FLOORS = {
    "support": 0,
    "spec": 1,
    "core": 2,
    "kernels": 3,
    "backends": 4,
    "layers": 5,
    "models": 6,
    "checkpoint": 7,
    "optimize": 7,
    "evaluation": 8,
    "integrations": 8,
    "hub": 8,
    "engines": 9,
    "jobs": 10,
    "report": 10,
    "cli": 11,
    "__main__": 12,
    "__init__": 12,
}
#: Library → the only files, or folders, that may import it.
DOORS = {
    "transformers": {
        "models/sites.py",
        "checkpoint/read.py",
        "checkpoint/architecture.py",
        "integrations/transformers.py",
        "engines/",
        "cli/",
    },
    "peft": {"integrations/peft.py"},
    "datasets": {"support/text.py"},
    "gguf": {"checkpoint/gguf.py"},
    "typer": {"cli/"},
    "rich": {"cli/"},
    "safetensors": {
        "checkpoint/files.py",
        "checkpoint/headers.py",
        "checkpoint/journal.py",
        "checkpoint/read.py",
        "checkpoint/write.py",
    },
    "accelerate": {"checkpoint/read.py"},
    "wandb": {"support/loggers.py"},
    "huggingface_hub": {"checkpoint/read.py", "hub/"},
    "lm_eval": {"evaluation/tasks.py"},
    "math_verify": {"evaluation/grading.py"},
    "triton": {
        "kernels/run/triton_decode.py",
        "kernels/fit/triton_loops.py",
        "kernels/fit/triton_matrices.py",
        "kernels/run/triton_linear.py",
        "kernels/run/triton_rotate.py",
        "kernels/availability.py",
        "kernels/run/tune.py",
    },
    "vllm": {"engines/vllm.py", "integrations/vllm/compat.py"},
    "plotly": {f"report/{name}.py" for name in ("figures", "evidence", "scatter", "style")},
    "kaleido": {"report/images.py"},
    "choreographer": {"report/images.py"},
    "pickle": set(),
}
FILES = sorted(SOURCE.rglob("*.py"))


def imports(file: Path):
    """(level, module, names) of every import statement."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name, []


def unit(file: Path) -> str:
    """Folder or module directly below the package."""
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_point_to_lower_floors(file):
    package = file.relative_to(SOURCE).parts[:-1]
    for level, module, names in imports(file):
        if level == 0:
            assert module.split(".")[0] != "pairquant", f"{file}: imports inside the package are relative"
            continue
        base = (*package[: len(package) - level + 1], *(part for part in module.split(".") if part))
        for target in [base[0]] if base else names:
            if target != unit(file) and target in FLOORS:
                message = f"{unit(file)} (floor {FLOORS[unit(file)]}) imports {target} (floor {FLOORS[target]})"
                assert FLOORS[target] < FLOORS[unit(file)], message


@pytest.mark.parametrize("library", DOORS)
def test_heavy_libraries_have_one_door(library):
    users = {
        str(file.relative_to(SOURCE))
        for file in FILES
        for level, module, _ in imports(file)
        if level == 0 and module.split(".")[0] == library
    }
    doors = DOORS[library]
    assert {user for user in users if user not in doors and user.partition("/")[0] + "/" not in doors} == set()


def test_every_unit_has_a_floor():
    assert {unit(file) for file in FILES} == set(FLOORS)


def test_no_message_less_assert_and_no_bare_except_in_src():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            assert not (isinstance(node, ast.Assert) and node.msg is None), f"{file}:{node.lineno}"
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{file}:{node.lineno}"
