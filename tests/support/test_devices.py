"""Devices by name: which there are, whose they are among several processes, what is said of others."""

import pytest
import torch

from pairquant.support import devices
from pairquant.support.devices import current, free_bytes, resolve_device
from pairquant.support.errors import ConfigError


@pytest.fixture
def gpus(monkeypatch):
    """Sets how many GPUs there seem to be, and which process of a group this is."""

    def pretend(count, rank=None):
        monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: count)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", str(rank))

    return pretend


@pytest.mark.parametrize(
    ("name", "count", "rank", "device"),
    [
        ("auto", 0, None, "cpu"),
        ("cpu", 0, None, "cpu"),
        ("cpu", 2, 1, "cpu"),
        ("auto", 2, None, "cuda:0"),
        ("cuda", 2, None, "cuda:0"),
        ("cuda:1", 2, None, "cuda:1"),
        ("auto", 2, 1, "cuda:1"),
        ("cuda", 2, 1, "cuda:1"),
        ("cuda:0", 2, 1, "cuda:0"),
    ],
)
def test_names_are_resolved(gpus, name, count, rank, device):
    gpus(count, rank)
    assert resolve_device(name) == torch.device(device)


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("cuda", 0, r"device is 'cuda' \(no CUDA device was found\), allowed: auto, cpu"),
        ("cuda:7", 2, r"device is 'cuda:7', allowed: auto, cpu, cuda, cuda:0, cuda:1; did you mean 'cuda:"),
        ("gpu", 0, r"device is 'gpu', allowed: auto, cpu; did you mean 'cpu'"),
    ],
)
def test_other_names_are_refused_with_what_there_is(gpus, name, count, message):
    gpus(count)
    with pytest.raises(ConfigError, match=message):
        resolve_device(name)


def test_more_processes_than_gpus_are_refused(gpus):
    gpus(2, rank=2)
    with pytest.raises(ConfigError, match=r"process 2 has no GPU of its own: there are 2. Lower --nproc-per-node"):
        resolve_device("auto")


def test_on_a_cpu_nothing_is_made_current():
    with current(torch.device("cpu")):
        assert torch.zeros(1).device.type == "cpu"


def test_free_memory_of_the_host_is_some_of_what_it_has():
    import psutil

    assert 0 < free_bytes(torch.device("cpu")) <= psutil.virtual_memory().total
