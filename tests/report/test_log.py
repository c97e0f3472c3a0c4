"""Reading a log back: blocks in order, the last word on each counts, and a line that is no event is named."""

import json

import pytest

from pairquant.report.log import BlockRecord, Epoch, read_log
from pairquant.support.errors import CheckpointError


def write(directory, *events):
    (directory / "pairquant.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def block(index, seconds, history=()):
    return {"event": "block", "index": index, "seconds": seconds, "gpu_peak": 5, "history": list(history)}


def test_without_a_log_there_are_no_blocks(tmp_path):
    assert read_log(tmp_path) == []


def test_blocks_come_in_order_and_the_last_of_each_counts(tmp_path):
    epoch = {"stage": 1, "epoch": 0, "loss": None, "validation": 0.5}
    write(tmp_path, {"event": "start"}, block(1, 9.0), block(0, 2.0), block(1, 3.0, [epoch]), {"event": "end"})
    history = (Epoch(1, 0, None, 0.5),)
    assert read_log(tmp_path) == [BlockRecord(0, 2.0, 5, ()), BlockRecord(1, 3.0, 5, history)]


@pytest.mark.parametrize(
    "damaged", ["{", "[]", "{}", '{"event": "block", "index": 1}', '{"event": "block", "index": "a"}']
)
def test_a_damaged_line_is_named_with_the_remedy(tmp_path, damaged):
    (tmp_path / "pairquant.jsonl").write_text('{"event": "start"}\n' + damaged + "\n")
    with pytest.raises(CheckpointError, match=r"line 2 is no event.*delete it"):
        read_log(tmp_path)
