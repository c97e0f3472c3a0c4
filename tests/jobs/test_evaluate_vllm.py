"""`pairquant eval --engine vllm`: answers and tasks by vLLM on a CPU are those of Transformers, for both models."""

import json

import pytest
from local_task import TASK
from tiny_models import TEXT, save_tiny

import pairquant
from pairquant.evaluation.reasoning import AnswerPlan
from pairquant.evaluation.tasks import TaskPlan
from pairquant.support.errors import ConfigError, PairQuantError

pytest.importorskip("vllm", reason="needs vLLM")
pytest.importorskip("lm_eval")

TASKS = (
    TASK
    + """---
task: small_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
generation_kwargs: {{until: ["."], max_gen_toks: 8}}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
metric_list: [{{metric: exact_match}}]
"""
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("assessment-vllm")
    source = save_tiny(root / "source")
    for file in (source / "config.json", source / "generation_config.json"):
        file.write_text(file.read_text().replace('"max_position_embeddings": 128', '"max_position_embeddings": 1024'))
    config = pairquant.QuantConfig(preset="rtn", bits=2, group_size=64, rotations=2)  # with other answers, then
    pairquant.quantize(source, root / "packed", config, device="cpu")
    rows = [
        {"question": f"{i} and?", "choices": [f" {i + 1}", f" {i * i}", " nothing"], "gold": i % 3} for i in range(24)
    ]
    (root / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for number, task in enumerate(TASKS.format(data=root / "questions.jsonl").split("---\n")):
        (root / f"{number}.yaml").write_text(task)
    return root


def assess(directory, engine, **options):
    return pairquant.evaluate(
        directory / "packed", directory / "source", [str(TEXT)], seq_len=32, max_tokens=64, device="cpu", engine=engine,
        **options,
    )  # fmt: skip


def test_answers_and_tasks_are_those_of_transformers(directory, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    options = {
        "gsm8k": 3, "answers": AnswerPlan(tokens=8, batch=2),
        "tasks": TaskPlan(("small_choice", "small_answer"), directory),
    }  # fmt: skip
    steps = []
    ours = assess(directory, "vllm", **options, on_windows=lambda name, count: lambda: steps.append(name))
    theirs = assess(directory, "transformers", **options)
    assert ours["tasks"] == theirs["tasks"]
    assert ours["answers"] == theirs["answers"]
    assert ours["texts"] == theirs["texts"]
    assert len(ours["tasks"]["reference"]["small_choice"]["acc"]["outcomes"]) == 24
    assert set(ours["tasks"]["paired"]) == {"small_choice", "small_answer"}
    assert ours["tasks"]["model"]["small_choice"] != ours["tasks"]["reference"]["small_choice"]
    assert (ours["engine"], theirs["engine"]) == ("vllm", "transformers")
    assert "vllm" in ours["versions"]
    assert {name: steps.count(name) for name in steps if "gsm8k" in name} == {"gsm8k": 3, "gsm8k, the original": 3}


def test_vllm_with_nothing_to_do_is_refused_before_weights_are_read(directory, monkeypatch):
    monkeypatch.setattr(pairquant.checkpoint.read.ModelFiles, "model", None)
    with pytest.raises(ConfigError, match="none are asked for. Add --gsm8k"):
        assess(directory, "vllm")


def test_without_vllm_nothing_is_begun(directory, monkeypatch):
    monkeypatch.setattr(pairquant.checkpoint.read.ModelFiles, "model", None)
    monkeypatch.setattr("pairquant.engines.choice.find_spec", lambda name: None)
    with pytest.raises(PairQuantError, match=r"engine is 'vllm', which is not installed.*pairquant\[vllm\]"):
        assess(directory, "vllm", gsm8k=1, answers=AnswerPlan(tokens=8))
