"""Some hundred checkpoints with one thing wrong; `benchmarks/mutate_checkpoints.py` tries ten thousand."""

import pytest
from examination import Bench, quiet
from hypothesis import HealthCheck, given, settings
from mutations import KINDS


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
