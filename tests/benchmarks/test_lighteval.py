"""Lighteval, in an environment that has it, scores our checkpoint as its own likelihoods say; see docs/evaluating.md."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import byte_tokenizer, save_tiny

import pairquant
from pairquant.checkpoint.read import ModelFiles

lighteval = importlib.util.find_spec("lighteval")
pytestmark = pytest.mark.skipif(lighteval is None, reason="Lighteval is not installed")

TASKS = Path(__file__).parents[2] / "benchmarks" / "lighteval_task.py"
ROWS = [
    {"question": f"What comes after {i}?", "choices": [f" {i + 1}", f" {i * i}", " nothing"], "gold": i % 3}
    for i in range(24)
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("lighteval")
    source = save_tiny(root / "source")
    config = source / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 128', '"max_position_embeddings": 1024'))
    pairquant.quantize(
        source, root / "packed", pairquant.QuantConfig(preset="rtn", group_size=64, rotations=2), device="cpu"
    )
    for name, rows in (("choice", ROWS), ("boxed", [{"problem": "1 + 1?", "answer": 2}])):
        (root / "problems" / name).mkdir(parents=True)
        (root / "problems" / name / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture(scope="module")
def scores(directory):
    """Task → metric → value, as Lighteval's command writes them."""
    if not (Path(lighteval.origin).parent / "tasks/tasks/tinyBenchmarks.pkl").exists():
        pytest.skip("Lighteval has not been online yet")
    command = [
        str(Path(sys.executable).with_name("lighteval")), "accelerate", "model_name=packed,dtype=float32,batch_size=4",
        "local_choice,local_boxed", "--custom-tasks", str(TASKS), "--output-dir", "out",
    ]  # fmt: skip
    environment = {**os.environ, "PROBLEMS": "problems", "ANSWER_TOKENS": "8", "HF_HOME": str(directory / "home")}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (directory / "out").rglob("results_*.json")
    return json.loads(results.read_text())["results"]


@torch.no_grad()
def likelihood(model, question: str, choice: str) -> float:
    before, whole = (byte_tokenizer()(text, return_tensors="pt")["input_ids"] for text in (question, question + choice))
    logits = model(whole).logits[0, before.shape[1] - 1 : -1].log_softmax(-1)
    return logits.gather(1, whole[0, before.shape[1] :, None]).sum().item()


def test_choices_are_those_of_the_packed_model(scores, directory):
    model = ModelFiles.find(str(directory / "packed")).model(torch.float32)
    best = [max(range(3), key=lambda i: likelihood(model, row["question"], row["choices"][i])) for row in ROWS]
    expected = sum(chosen == row["gold"] for chosen, row in zip(best, ROWS, strict=True)) / len(ROWS)
    assert scores["local_choice|0"]["acc"] == pytest.approx(expected)


def test_answers_are_generated_and_graded(scores):
    assert scores["local_boxed|0"]["extractive_match"] == 0  # of a random model
