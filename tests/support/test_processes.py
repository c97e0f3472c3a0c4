"""Work in a process of its own: what it tells, gives and raises, and what is said when it dies."""

import multiprocessing
import os

import process_work
import pytest

from pairquant.support.errors import ConfigError, ResourceError
from pairquant.support.processes import in_own_process


@pytest.fixture
def told():
    return []


def run(work, told):
    return in_own_process(work, process_work.Job("tiny", os.getpid()), told.append, "--batch")


def test_strings_are_told_and_the_last_word_is_the_result(told):
    found = run(process_work.works, told)
    assert found == {"model": "tiny", "elsewhere": True, "ignores Ctrl-C": True}
    assert told == ["loading", "measuring"]
    assert multiprocessing.active_children() == []


def test_errors_of_ours_come_back_as_they_are(told):
    with pytest.raises(ConfigError, match="^tiny is refused$"):
        run(process_work.refuses, told)
    assert told == ["loading"]


@pytest.mark.parametrize(("work", "code"), [("dies", 7), ("breaks", 1)])
def test_a_process_that_ends_without_a_result_is_named_with_its_remedy(told, work, code):
    with pytest.raises(ResourceError, match=f"'tiny' ended with exit code {code}.*memory ran out: lower --batch"):
        run(getattr(process_work, work), told)
    assert multiprocessing.active_children() == []


def test_the_process_ends_when_the_one_that_asked_is_interrupted():
    def interrupt(stage):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_own_process(process_work.works, process_work.Job("tiny", os.getpid()), interrupt, "--batch")
    assert multiprocessing.active_children() == []
