"""Some hundred checkpoints with one thing wrong; `benchmarks/mutate_checkpoints.py` tries ten thousand."""

import pickle

import pytest
from examination import Bench, quiet
from hypothesis import HealthCheck, given, settings
from mutations import KINDS, PICKLE, Mutation

import pairquant
from pairquant.support.errors import CheckpointError


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with quiet():
        yield Bench(tmp_path_factory.mktemp("mutations"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_mutation_loads_right_or_is_refused_by_name(bench, kind):
    @settings(max_examples=10, suppress_health_check=list(HealthCheck))
    @given(kind())
    def examine(mutation):
        bench.examine(mutation)

    examine()


def mutation(inspect="refused", transformers="same"):
    return Mutation("test", "a pickle", lambda draft: draft.files.update({"model.pt": PICKLE}), inspect, transformers)


def test_the_bench_notices_a_reader_that_accepts_too_much(bench):
    with pytest.raises(AssertionError, match="inspect: same, must be refused"):
        bench.examine(mutation())


def test_the_bench_notices_errors_that_are_not_ours(bench, monkeypatch):
    monkeypatch.setattr(pairquant, "inspect", lambda directory: {}["config"])
    with pytest.raises(AssertionError, match="none of our errors, must be refused. KeyError"):
        bench.examine(mutation())


def test_the_bench_notices_pickles_that_are_opened_and_run(bench, monkeypatch):
    def opens(directory):
        (directory / "model.pt").read_bytes()
        raise CheckpointError("opened")

    def runs(directory):
        pickle.loads(PICKLE)
        raise CheckpointError("run")

    for reader, message in ((opens, "pickles were opened"), (runs, "foreign code was run")):
        monkeypatch.setattr(pairquant, "inspect", reader)
        with pytest.raises(AssertionError, match=message):
            bench.examine(mutation())
