"""The memory that decoded weights may take."""

import gc
import warnings

import pytest
import torch

from pairquant.kernels.run.decoded_budget import VARIABLES, Budget, budget, limit_of, settings
from pairquant.support.errors import ConfigError


def test_no_more_is_given_than_there_is_and_freed_tensors_give_theirs_back():
    found = Budget(100, "NAME")
    tensor = torch.empty(60, dtype=torch.uint8)
    assert found.take(tensor.nbytes)
    found.give_back_with(tensor)
    with pytest.warns(UserWarning, match="NAME holds no more decoded weights: 0.00 of 0.00 GiB"):
        assert not found.take(41)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert not found.take(41)
    assert found.take(40)
    view = tensor.view(6, 10)
    del tensor, view
    gc.collect()
    assert found.taken == 40


@pytest.mark.parametrize(("text", "nbytes"), [("0", 0), ("1.5", 3 * 2**29), ("2", 2**31)])
def test_the_variable_is_in_gib(text, nbytes):
    assert limit_of("NAME", text) == nbytes


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "2GiB"])
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(ConfigError, match="NAME is"):
        limit_of("NAME", text)


@pytest.mark.parametrize("device", VARIABLES)
def test_by_default_nothing_is_kept_and_each_type_of_device_has_its_own(device, monkeypatch):
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    budget.cache_clear()
    assert not budget(device).take(1)
    monkeypatch.setenv(VARIABLES[device], "1")
    budget.cache_clear()
    assert [kind for kind in VARIABLES if budget(kind).take(2**30)] == [device]
    budget.cache_clear()


def test_the_settings_are_the_texts_of_the_variables(monkeypatch):
    first, second = VARIABLES.values()
    monkeypatch.setenv(first, "1.5")
    monkeypatch.delenv(second, raising=False)
    assert settings() == {first: "1.5", second: "0"}
