"""CUDA graphs of a function of a few rows: each row as the function gives it, the graphs few, and no result overwritten."""

import pytest
import torch

from pairquant.kernels.run.replay import SIZES, Replayed, size_for

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_every_number_of_rows_has_the_next_size():
    assert [size_for(rows) for rows in (1, 2, 3, 5, 33, 64)] == [1, 2, 4, 8, 64, 64]
    assert [size_for(rows) for rows in (0, SIZES[-1] + 1)] == [None, None]


def test_on_a_cpu_the_function_itself_is_called():
    calls = []
    replayed = Replayed(lambda x: calls.append(len(x)) or x * 2)
    x = torch.randn(3, 4)
    assert torch.equal(replayed(x), x * 2)
    assert (calls, replayed.graphs) == ([3], {})


@needs_cuda
def test_rows_are_those_of_the_function_and_later_calls_leave_earlier_results():
    weight = torch.randn(16, 8, device="cuda")
    replayed = Replayed(lambda x: x @ weight.to(x.dtype))
    found = {}
    for rows in (1, 3, 4, 64, 65, 0):
        x = torch.randn(rows, 16, device="cuda")
        found[rows] = replayed(x), x @ weight
    for mine, expected in found.values():
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    assert set(replayed.graphs) == {(1, torch.float32), (4, torch.float32), (64, torch.float32)}
    half = torch.randn(1, 16, device="cuda", dtype=torch.float16)
    assert replayed(half).dtype == torch.float16
