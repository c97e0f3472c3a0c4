"""Choosing tiles by measurement, with a clock that can be read."""

import pytest
import torch

pytest.importorskip("triton")

from pairquant.kernels.run import table, tune
from pairquant.support.errors import ResourceError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("tokens", table.TOKENS)
def test_candidates_fit_their_kernels(tokens):
    found = tune.candidates(tokens)
    assert len(found) == len(set(found)) > 5
    for choice in found:
        if isinstance(choice, table.Narrow):
            assert tokens <= 16
            assert 128 % choice.rows == 0
        elif isinstance(choice, table.Wide):
            assert 128 % choice.rows == 0
            assert choice.tokens & (choice.tokens - 1) == 0


def test_the_fastest_wins_and_what_fails_is_left_out(monkeypatch):
    tried = []

    def linear(x, weights, bias, choice):
        tried.append((x.shape[0], choice))
        if choice.rows == 64:
            raise RuntimeError("out of resource: shared memory")

    def timer(call):
        call()
        return -len(tried)  # later is faster

    monkeypatch.setattr(tune.launch, "linear", linear)
    found = tune.tune_shape((128, 64), 128, 64, DEVICE, timer)
    assert set(found) == set(table.TOKENS)
    for tokens in table.TOKENS:
        assert found[tokens] == [c for t, c in tried if t == tokens and c.rows != 64][-1]


def test_nothing_that_runs_is_an_error(monkeypatch):
    def linear(*_):
        raise RuntimeError("out of resource")

    monkeypatch.setattr(tune.launch, "linear", linear)
    with pytest.raises(ResourceError, match=f"no tile for 1 tokens runs on {DEVICE}: out of resource"):
        tune.tune_shape((64,), 128, 64, DEVICE, lambda call: call())
