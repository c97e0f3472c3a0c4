"""Which model is closest, and by how much."""

import pytest

from pairquant.evaluation.ranking import rank


def test_each_chain_counts_by_its_tokens():
    found = rank({"a": [0.1, 0.9], "b": [0.3, 0.2]}, weights=[9, 1])
    assert found.model == "a"  # though b's mean over chains is the smaller
    assert found.ahead_of["b"].kl == pytest.approx(0.9 * 0.2 - 0.1 * 0.7)


def test_what_is_not_a_number_is_not_the_closest():
    assert rank({"broken": [float("nan")] * 2, "whole": [0.1, 0.1]}).model == "whole"


def test_differences_are_taken_window_for_window():
    gap = rank({"a": [1.0, 2.0, 3.0], "b": [1.5, 2.5, 3.5]}).ahead_of["b"]
    assert gap.interval == (0.5, 0.5)  # though the models' own means are far from certain


def test_a_single_window_has_no_interval():
    assert rank({"a": [1.0], "b": [2.0]}).ahead_of["b"].interval is None
