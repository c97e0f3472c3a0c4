"""Without an earlier run nothing is finished."""

import pytest

from pairquant.optimize.finished import BlockResult, Nothing


def test_no_earlier_run_has_results_or_streams():
    nothing = Nothing()
    assert nothing.count == 0
    assert nothing.snapshot() is None
    with pytest.raises(IndexError, match="3"):
        nothing.result(3)


def test_results_do_not_share_what_is_filled_in():
    first, second = BlockResult(0, "model.layers.0"), BlockResult(1, "model.layers.1")
    first.errors["model.layers.0.q_proj"] = 0.1
    first.tokens["model.layers.0.experts"] = [3]
    assert second.errors == {}
    assert second.tokens == {}
