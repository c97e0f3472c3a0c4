"""Intervals and tests against published or hand-made numbers."""

import pytest
import torch

from pairquant.evaluation.statistics import bootstrap_mean, mcnemar, probability_no_worse, wilson


def test_wilson_by_the_formula_and_at_the_ends():
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert wilson(20, 20) == pytest.approx((0.8389, 1), abs=1e-4)


def test_mcnemar_is_the_sign_test_of_the_changes():
    assert mcnemar(0, 0) == 1
    assert mcnemar(1, 5) == mcnemar(5, 1) == pytest.approx(2 * 7 / 64)
    assert mcnemar(3, 3) == 1
    assert mcnemar(400, 500) == pytest.approx(0.00095, rel=0.05)  # normal approximation with continuity: z = 3.3


def test_the_probability_of_being_no_worse():
    assert probability_no_worse(0, 0) == 0.5
    assert probability_no_worse(0, 1) == 0.75  # ∫ 2p dp over p ≥ 1/2
    assert probability_no_worse(1, 0) == 0.25
    assert probability_no_worse(7, 7) == 0.5


def test_bootstrap_agrees_with_the_normal_interval_and_is_seeded():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)).tolist()
    mean, error = sum(values) / 400, torch.tensor(values).std().item() / 20
    low, high = bootstrap_mean(values)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
    assert bootstrap_mean(values) == (low, high) != bootstrap_mean(values, seed=1)


def test_bootstrap_weighs():
    assert bootstrap_mean([1.0, 3.0], [1.0, 0.0]) is not None
    low, high = bootstrap_mean([1.0, 2.0, 9.0], [1.0, 1.0, 1e-9])
    assert (low, high) == pytest.approx((1.0, 9.0))  # three draws of the last are as likely as 1 in 27
    assert bootstrap_mean([1.0]) is None
