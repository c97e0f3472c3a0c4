"""`pairquant bench`: a model beside the original, each in its own process."""

import json
import multiprocessing

import pytest
import torch
from tiny_models import TEXT, save_tiny
from typer.testing import CliRunner

import pairquant
from pairquant.cli.app import app
from pairquant.engines.engine import EngineOptions
from pairquant.evaluation.speed import Workload
from pairquant.jobs.bench import Job, bench, measure_model, ratios
from pairquant.support.environment import device_name
from pairquant.support.errors import ConfigError, ResourceError, SourceError
from pairquant.support.processes import in_own_process

SPEEDS = ("prefill_tokens_per_s", "decode_tokens_per_s", "first_token_s")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    config = pairquant.QuantConfig(
        preset="quick", group_size=32, rotations=2, samples=4, seq_len=32, calibration=(str(TEXT),)
    )
    pairquant.quantize(save_tiny(root / "source"), root / "q4", config, device="cpu")
    return root


@pytest.fixture(scope="module")
def run(directory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        return CliRunner().invoke(
            app,
            [
                "bench", "q4", "--reference", "source", "--batch", "1", "--batch", "3", "--prompt-tokens", "16",
                "--new-tokens", "6", "--repeats", "2", "--device", "cpu", "--engine", "transformers",
                "--json", "result.json",
            ],
        )  # fmt: skip


@pytest.fixture(scope="module")
def result(run, directory):
    assert run.exit_code == 0, run.output
    return json.loads((directory / "result.json").read_text())


def test_the_table_shows_both_models_and_their_ratio(run, result):
    assert run.output.splitlines()[0].split() == ["q4", "source", "ratio"]
    lines = {line.split("  ")[0] for line in run.output.splitlines()}
    assert lines >= {"size on disk", "peak memory", "batch 3: decode, tokens/s", "batch 1: first token"}
    assert "16 + 6 tokens, median of 2; transformers" in run.output


def test_the_json_tells_numbers_and_what_they_were_measured_on(result, directory):
    assert set(result) == {"model", "reference", "ratios", "workload", "engine", "device", "versions"}
    assert result["workload"] == {
        "batches": [1, 3], "prompt_tokens": 16, "new_tokens": 6, "repeats": 2, "seed": 0,
    }  # fmt: skip
    assert result["engine"] == "transformers"
    assert result["device"] == device_name(torch.device("cpu"))
    assert set(result["versions"]) == {"python", "pairquant", "torch", "transformers"}
    for entry, name in ((result["model"], "q4"), (result["reference"], "source")):
        assert entry["name"] == name
        assert entry["size_bytes"] == (directory / name / "model.safetensors").stat().st_size
        assert (entry["dtype"], entry["compiled"]) == ("bfloat16", False)
        assert [row["batch"] for row in entry["rows"]] == [1, 3]
        assert all(row[key] > 0 for row in entry["rows"] for key in SPEEDS)


def test_memory_is_that_of_each_model_alone(result):
    if result["model"]["peak_memory_bytes"] is None:
        pytest.skip("the resident set is known on Linux only")
    for entry in (result["model"], result["reference"]):
        assert entry["size_bytes"] < entry["peak_memory_bytes"] < 2**30


def test_ratios_are_those_of_the_numbers(result):
    model, reference, ratio = result["model"], result["reference"], result["ratios"]
    assert ratio["size_bytes"] == pytest.approx(model["size_bytes"] / reference["size_bytes"])
    assert ratio["size_bytes"] < 0.5
    for ours, theirs, row in zip(model["rows"], reference["rows"], ratio["rows"], strict=True):
        assert row == {"batch": ours["batch"], **{key: pytest.approx(ours[key] / theirs[key]) for key in SPEEDS}}


def test_numbers_that_are_not_known_have_no_ratio():
    entry = {"size_bytes": 1, "load_s": 1.0, "peak_memory_bytes": None, "rows": []}
    assert ratios(entry, entry) == {"size_bytes": 1, "load_s": 1, "peak_memory_bytes": None, "rows": []}


def test_prefill_and_first_token_are_two_views_of_one_time(directory):
    options = EngineOptions("cpu", "float32")
    workload = Workload((2,), prompt_tokens=16, new_tokens=4, repeats=1)
    *stages, entry = measure_model(Job(str(directory / "q4"), False, "transformers", options, workload))
    assert [stage.split()[0] for stage in stages] == ["loading", "measuring"]
    (row,) = entry["rows"]
    assert row["prefill_tokens_per_s"] == pytest.approx(2 * 16 / row["first_token_s"])


def test_compiled_on_request(directory):
    """Only the plain model: whether a quantizer lets Transformers compile is its own matter."""
    options = EngineOptions("cpu", "float32", compile=True)
    workload = Workload((1,), prompt_tokens=8, new_tokens=4, repeats=1)
    *_, entry = measure_model(Job(str(directory / "source"), False, "transformers", options, workload))
    assert entry["compiled"] is True


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "sauce"}, SourceError, "did you mean"),
        ({"model": "source", "reference": "q5"}, SourceError, "did you mean"),
        ({"model": "source", "engine": "vlm"}, ConfigError, "did you mean 'vllm'"),
        ({"model": "source", "dtype": "int4"}, ConfigError, "dtype is 'int4', allowed: auto"),
        ({"model": "source", "workload": Workload(prompt_tokens=125)}, ConfigError, "253, allowed: 128"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(directory, monkeypatch, arguments, error, message):
    monkeypatch.chdir(directory)
    stages = []
    with pytest.raises(error, match=message):
        bench(**arguments, on_stage=stages.append)
    assert stages == []


def test_a_process_that_dies_is_told_with_its_exit_code(directory):
    def kill(stage):
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(ResourceError, match="exit code -9"):
        bench(directory / "source", workload=Workload(prompt_tokens=8, new_tokens=4), device="cpu", on_stage=kill)


def test_errors_of_the_process_come_back_as_they_are(directory):
    options, workload = EngineOptions("cpu"), Workload()
    job = Job(str(directory / "gone"), False, "transformers", options, workload)
    with pytest.raises(SourceError, match="gone"):
        in_own_process(measure_model, job, lambda stage: None, "--batch")
