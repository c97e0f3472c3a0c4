"""lm-eval on our models: a local task, offline, gives what the dequantized plain model gives."""

import json

import pytest
from local_task import TASK
from tiny_models import save_tiny

import pairquant
from pairquant.checkpoint.read import ModelFiles
from pairquant.evaluation.tasks import Metric, TaskPlan, Tasks, paired
from pairquant.support.errors import ConfigError, TextError

pytest.importorskip("lm_eval")

COUNT = 24


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"What comes after {i}?", "choices": [f" {i + 1}", f" {i * i}", " nothing"], "gold": i % 3}
        for i in range(COUNT)
    ]
    (root / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "tasks").mkdir()
    (root / "tasks" / "small.yaml").write_text(TASK.format(data=root / "questions.jsonl"))
    (root / "tasks" / "lost.yaml").write_text(
        TASK.format(data=root / "gone.jsonl").replace("small_choice", "lost_choice")
    )
    return root


@pytest.fixture(scope="module")
def small(directory):
    return Tasks(TaskPlan(("small_choice",), directory / "tasks"))


@pytest.fixture(scope="module")
def packed(directory):
    config = pairquant.QuantConfig(preset="rtn", bits=2, group_size=64, rotations=2)  # so coarse that answers change
    pairquant.quantize(save_tiny(directory / "source"), directory / "packed", config, device="cpu")
    return ModelFiles.find(str(directory / "packed"))


def test_the_packed_model_scores_as_its_dequantized_plain_model(packed, small, directory):
    model, tokenizer = packed.model("float32"), packed.tokenizer()
    ours = small.run(model, tokenizer)
    plain = packed.model("float32").dequantize()
    assert not any("Rotated" in type(module).__name__ for module in plain.modules())
    theirs = small.run(plain, tokenizer)
    assert ours == theirs
    assert set(ours["small_choice"]) == {"acc", "acc_norm"}
    accuracy = ours["small_choice"]["acc"]
    assert len(accuracy.outcomes) == COUNT
    assert accuracy.value == pytest.approx(sum(accuracy.outcomes) / COUNT)
    assert accuracy.stderr == pytest.approx((accuracy.value * (1 - accuracy.value) / (COUNT - 1)) ** 0.5)
    original = small.run(ModelFiles.find(str(directory / "source")).model("float32"), tokenizer)
    assert original["small_choice"]["acc"].outcomes != accuracy.outcomes
    pairs = paired(ours, theirs)["small_choice"]["acc"]
    assert (pairs.lost, pairs.gained, pairs.p_value) == (0, 0, 1)


def test_pairs_are_made_of_outcomes_only():
    ours = {"task": {"acc": Metric(0.5, None, [True, False]), "words": Metric(3.0, None, None)}}
    theirs = {"task": {"acc": Metric(1.0, None, [True, True]), "words": Metric(2.0, None, None)}}
    found = paired(ours, theirs)
    assert set(found["task"]) == {"acc"}
    assert (found["task"]["acc"].lost, found["task"]["acc"].gained) == (1, 0)


def test_unknown_tasks_are_named(directory):
    with pytest.raises(ConfigError, match="task is 'small_choise'.*did you mean 'small_choice'"):
        Tasks(TaskPlan(("small_choise",), directory / "tasks"))
    with pytest.raises(ConfigError, match="does not exist"):
        TaskPlan(("small_choice",), directory / "nowhere")
    with pytest.raises(ConfigError, match="limit of questions 0"):
        TaskPlan(("small_choice",), limit=0)


def test_a_task_without_its_data_is_named_before_anything_runs(directory):
    with pytest.raises(TextError, match=r"lost_choice.*gone.jsonl"):
        Tasks(TaskPlan(("lost_choice",), directory / "tasks"))
