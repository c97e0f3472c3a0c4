"""`benchmarks/bench_reasoning.py`: divergence by place in a chain, and the number that an answer ends in."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import TEXT, save_tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_reasoning
from bench_reasoning import final, parts


def test_parts_are_means_over_the_chains_that_reach_them_and_over_the_longest_alone():
    kl = [
        torch.full((100,), 1.0),
        torch.cat([torch.full((128,), 2.0), torch.full((72,), 6.0)]),
        torch.full((300,), 4.0),
    ]
    found = {(part["of"], part["start"]): part for part in parts(kl, 300)}
    assert [(start, found["all", start]["chains"], found["all", start]["tokens"]) for start in (0, 128, 256)] == [
        (0, 3, 100 + 128 + 128), (128, 2, 72 + 128), (256, 1, 44),
    ]  # fmt: skip
    assert found["all", 0]["kl"] == pytest.approx((100 * 1 + 128 * 2 + 128 * 4) / 356)
    assert found["all", 128]["kl"] == pytest.approx((72 * 6 + 128 * 4) / 200)
    low, high = found["all", 128]["kl_interval"]
    assert 4 <= low < found["all", 128]["kl"] < high <= 6
    assert [found["longest", start]["kl"] for start in (0, 128, 256)] == [4, 4, 4]
    assert found["longest", 256]["kl_interval"] is None, "an interval from one chain"


@pytest.mark.parametrize(
    ("answer", "number"),
    [("5 apples, so \\boxed{12}. Or 7?", "12"), ("3 and 4\n#### 7", " 7"), ("It is 9.", "It is 9.")],
)
def test_the_final_part_is_what_the_grader_looks_at(answer, number):
    assert final(answer) == number


def test_rows_of_a_model_that_is_the_original(tmp_path, monkeypatch):
    """At 8 bits nothing changes: no divergence to speak of, and the same answers."""
    monkeypatch.setattr("setting.CALIBRATION", (str(TEXT),))
    model, output = save_tiny(tmp_path / "tiny", context=2048), tmp_path / "rows.jsonl"
    asked = ["--chains", "2", "6", "--problems", "2", "5", "--group-size", "32", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["bench_reasoning", str(model), "rtn:bits=8", "--output", str(output), *asked])
    bench_reasoning.main()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["what"], row["recipe"]) for row in rows] == [
        ("answers", "original"), ("chains", "rtn:bits=8"), ("chains", "rtn:bits=8"), ("answers", "rtn:bits=8"),
    ]  # fmt: skip
    assert all(0 < row["kl"] < 0.01 for row in rows[1:3])
    assert rows[3]["problems"] == 2
    assert rows[3]["paired"]["lost"] == rows[3]["paired"]["gained"] == 0
