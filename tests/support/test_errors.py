"""Every error of ours has one base, and the built-in class that callers expect."""

import pickle

import pytest

from pairquant.support import errors
from pairquant.support.errors import PairQuantError, did_you_mean

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_every_class_is_ours_says_when_it_is_raised_and_passes_between_processes(error):
    assert issubclass(error, PairQuantError)
    assert error.__doc__.endswith(".")
    again = pickle.loads(pickle.dumps(error("bits is 9, allowed: 4")))
    assert (type(again), str(again)) == (error, "bits is 9, allowed: 4")


def test_wrong_values_are_value_errors_and_the_world_s_faults_are_not():
    assert issubclass(errors.ConfigError, ValueError)
    assert not issubclass(errors.ResourceError, ValueError)
    assert not issubclass(errors.HubError, ValueError)


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("fst", ["fast", "best"], "; did you mean 'fast'?"),
        ("bset", iter(["fast", "best"]), "; did you mean 'best'?"),
        ("qwertz", ["fast", "best"], ""),
        ("fast", [], ""),
    ],
)
def test_the_closest_word_is_proposed_if_it_is_close(word, known, hint):
    assert did_you_mean(word, known) == hint
