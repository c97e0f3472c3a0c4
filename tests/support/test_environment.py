"""What a measurement was made on, as results tell it."""

import platform

import pytest
import torch

import pairquant
from pairquant.support import environment
from pairquant.support.environment import device_name, versions

CPU = torch.device("cpu")
LISTING = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: A CPU: of 2 GHz\n\nmodel name\t: another\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretends a content of /proc/cpuinfo, None for none, and a number of threads."""

    def pretend(listing, threads):
        file = tmp_path / "cpuinfo"
        if listing is not None:
            file.write_text(listing)
        monkeypatch.setattr(environment, "Path", lambda name: file)
        monkeypatch.setattr(environment.torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(environment.platform, "machine", lambda: "riscv64")

    return pretend


@pytest.mark.parametrize(
    ("listing", "threads", "name"),
    [
        (LISTING, 2, "A CPU: of 2 GHz, 2 threads"),
        (LISTING, 1, "A CPU: of 2 GHz, 1 thread"),
        ("processor\t: 0\n", 4, "riscv64 CPU, 4 threads"),
        (None, 4, "riscv64 CPU, 4 threads"),
    ],
)
def test_a_cpu_is_named_with_its_threads(machine, listing, threads, name):
    machine(listing, threads)
    assert device_name(CPU) == name


def test_a_gpu_is_named_as_its_driver_does(monkeypatch):
    monkeypatch.setattr(environment.torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert device_name(torch.device("cuda", 1)) == "GPU 1"


def test_versions_are_those_that_run():
    found = versions()
    assert set(found) == {"python", "pairquant", "torch", "transformers"}
    assert found["python"] == platform.python_version()
    assert found["pairquant"] == pairquant.__version__
    assert torch.__version__.startswith(found["torch"].partition("+")[0])
