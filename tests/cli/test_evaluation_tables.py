"""Tables of what was measured: no empty columns, no numbers that squeeze names."""

import pytest

from pairquant.cli.app import console
from pairquant.cli.evaluation_tables import perplexity, show
from pairquant.evaluation.quality import Quality
from pairquant.evaluation.results import Evaluation

ROW = Quality(tokens=4096, perplexity=12.5)


@pytest.mark.parametrize(
    ("value", "text"), [(12.5, "12.500"), (99_999.0, "99999.000"), (1.5e21, "1.50e+21"), (float("inf"), "inf")]
)
def test_a_huge_perplexity_stays_short(value, text):
    assert perplexity(value) == text
    assert len(perplexity(value)) <= 9


def test_without_a_reference_there_are_no_columns_for_it():
    with console.capture() as captured:
        show(Evaluation(model="m", texts={"a/wiki.txt": ROW}))
    shown = captured.get()
    assert "wiki.txt" in shown
    assert "12.500" in shown
    assert "KL" not in shown
    assert "top-1" not in shown


def test_texts_of_one_file_name_are_told_apart():
    with console.capture() as captured:
        show(Evaluation(model="m", texts={"a/wiki.txt": ROW, "b/wiki.txt": ROW}))
    assert "a/wiki.txt" in captured.get()
    assert "b/wiki.txt" in captured.get()
