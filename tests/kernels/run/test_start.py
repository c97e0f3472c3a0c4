"""What is launched a second time is what Triton launches, without asking it again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


#: What is left to Triton each time.
TRITONS = {"a tensor that is not aligned", "a stride of 64 bits", "a number of 64 bits"}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """By case: what `start` launched at first and then, and what Triton did: grid, kernel, arguments, whether any was a tensor."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, str(Path(__file__).with_name("launches.py"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_launch_is_the_one_that_triton_does(launches):
    assert len(launches) == 13
    for case, (first, second, tritons) in launches.items():
        assert first[:3] == second[:3] == tritons[:3], case


def test_the_second_launch_is_given_numbers(launches):
    for case, (_, second, tritons) in launches.items():
        assert tritons[3]
        assert second[3] == (case in TRITONS), case
    assert launches["as it was"][0][3]  # the first is left to Triton
    assert not launches["other tensors"][0][3]  # the kernel is known


def test_kernels_are_told_apart_by_what_triton_compiles_for(launches):
    kernels = {case: noted[0][1] for case, noted in launches.items()}
    usual = kernels.pop("as it was")
    assert {case for case, kernel in kernels.items() if kernel == usual} == {
        "other tensors",
        "other number",
        "an empty tensor",
    }
