"""The rules of the house: imports point to a lower floor or stay inside the same folder; heavy libraries have one door
each; modules with logic have a test file of their name; functions fit on a screen.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "pairquant"
FLOORS = {
    "support": 0,
    "spec": 1,
    "core": 2,
    "kernels": 3,
    "formats": 3,
    "backends": 4,
    "layers": 5,
    "models": 6,
    "checkpoint": 7,
    "optimize": 7,
    "evaluation": 8,
    "integrations": 8,
    "hub": 9,
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
        "models/names.py",
        "checkpoint/read.py",
        "checkpoint/architecture.py",
        "integrations/transformers.py",
        "engines/",
        "cli/",
    },
    "peft": {"integrations/peft.py"},
    "datasets": {"support/text.py"},
    "gguf": {f"checkpoint/{name}.py" for name in ("gguf", "gguf_file", "gguf_metadata", "gguf_rope")},
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
    "huggingface_hub": {"checkpoint/downloads.py", "checkpoint/read.py", "hub/"},
    "pydantic": {"evaluation/results.py"},
    "scipy": {"optimize/allocation.py"},
    "lm_eval": {"evaluation/tasks.py"},
    "math_verify": {"evaluation/grading.py"},
    "triton": {
        "kernels/run/start.py",
        "kernels/run/triton_bytes.py",
        "kernels/run/triton_decode.py",
        "kernels/run/triton_experts.py",
        "kernels/fit/triton_loops.py",
        "kernels/fit/triton_matrices.py",
        "kernels/run/triton_linear.py",
        "kernels/run/triton_norm.py",
        "kernels/run/triton_rotate.py",
        "kernels/run/triton_round.py",
        "kernels/run/triton_row_bytes.py",
        "kernels/run/triton_unpack.py",
        "kernels/run/triton_wide_bytes.py",
        "kernels/availability.py",
        "kernels/run/tune.py",
    },
    "vllm": {"engines/vllm.py", "integrations/vllm/compat.py"},
    "sglang": {"integrations/sglang/compat.py"},
    "plotly": {f"report/{name}.py" for name in ("figures", "evidence", "scatter", "style")},
    "kaleido": {"report/images.py"},
    "choreographer": {"report/images.py"},
    "pickle": set(),
}
#: A module whose functions have more statements than this has logic, and a test file of its name.
LOGIC = 15
#: Of the modules with logic, those that need have none, and where they are tested instead.
TESTED_ELSEWHERE = {
    "kernels/fit/triton_loops.py": "Triton kernels, by their launcher: kernels/fit/test_loops.py",
    "kernels/fit/triton_matrices.py": "Triton kernels, by their launcher: kernels/fit/test_matrices.py",
    "kernels/run/triton_bytes.py": "Triton functions, by the launcher: kernels/run/test_launch_rounded.py",
    "kernels/run/triton_decode.py": "Triton kernels, by their launcher: kernels/run/test_launch.py",
    "kernels/run/triton_linear.py": "Triton kernels, by their launcher: kernels/run/test_launch.py",
    "kernels/run/triton_norm.py": "Triton kernels, by their launcher: kernels/run/test_launch_norm.py",
    "kernels/run/triton_rotate.py": "Triton kernels, by their launcher: kernels/run/test_launch.py",
    "kernels/run/triton_round.py": "Triton kernels, by their launcher: kernels/run/test_launch_rounded.py",
    "kernels/run/triton_row_bytes.py": "Triton kernels, by their launcher: kernels/run/test_launch_rounded.py",
    "kernels/run/triton_wide_bytes.py": "Triton kernels, by their launcher: kernels/run/test_launch_rounded.py",
}
#: Share of the modules with logic that must have their test file.
TESTED_SHARE = 0.8
#: Lines of a function that fits on a screen. Not so: kernels, which are one loop, and commands, whose options are parameters.
SCREEN = 60
LONGER = {"kernels/run/triton_", "kernels/fit/triton_", "cli/"}
#: Files directly in the package: a newcomer sees at a glance where to go on.
TOP_FILES = 6
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


def functions(file: Path):
    """Every function of a file, methods and functions within functions included."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kinds)]


def statements(function: ast.AST) -> int:
    """Without its docstring and functions within it, which are counted for themselves."""
    count = 0
    for node in ast.iter_child_nodes(function):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        count += (isinstance(node, ast.stmt) and not is_docstring) + statements(node)
    return count


@cache
def modules_with_logic() -> dict[str, Path]:
    """Path of a module in the package → where its test file is to be."""
    found = {}
    for file in FILES:
        path = file.relative_to(SOURCE)
        if sum(map(statements, functions(file))) > LOGIC and path.parent != Path():
            found[path.as_posix()] = TESTS / path.with_name(f"test_{path.name}")
    return found


def test_modules_with_logic_have_a_test_file_of_their_name():
    wanted = {path: test for path, test in modules_with_logic().items() if path not in TESTED_ELSEWHERE}
    missing = [path for path, test in wanted.items() if not test.is_file()]
    share = 1 - len(missing) / len(wanted)
    print(
        f"{share:.0%} of {len(wanted)} modules with logic have a test file of their name; not so: {', '.join(missing)}"
    )
    assert share >= TESTED_SHARE, (
        f"{share:.0%} have one, at least {TESTED_SHARE:.0%} must; missing: {', '.join(missing)}"
    )


def test_each_exception_is_needed_and_says_where_its_tests_are():
    for path, reason in TESTED_ELSEWHERE.items():
        test = modules_with_logic().get(path)
        assert test is not None, f"{path} is not there, or has no logic: take it out of TESTED_ELSEWHERE"
        assert not test.is_file(), f"{path} has a test file of its name: take it out of TESTED_ELSEWHERE"
        assert (TESTS / reason.rpartition(": ")[2]).is_file(), f"{path}: {reason} is not there"


def test_functions_fit_on_a_screen():
    long = [
        f"{path}:{function.lineno} {function.name} has {lines} lines"
        for file in FILES
        if not (path := file.relative_to(SOURCE).as_posix()).startswith(tuple(LONGER))
        for function in functions(file)
        if (lines := function.end_lineno - function.lineno + 1) > SCREEN
    ]
    assert long == [], f"at most {SCREEN}"


def test_few_files_lie_directly_in_the_package():
    files = [file.name for file in SOURCE.iterdir() if file.is_file()]
    assert len(files) <= TOP_FILES, f"{sorted(files)}: put them into the folder of their subject"
