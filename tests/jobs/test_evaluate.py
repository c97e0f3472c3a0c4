"""`pairquant eval` from end to end, on a tiny model and its original."""

import json
import shutil
import subprocess
import sys

import pytest
from tiny_models import TEXT, beginning_tokenizer, byte_tokenizer, save_tiny
from typer.testing import CliRunner

import pairquant
from pairquant.checkpoint.read import ModelFiles
from pairquant.cli import app
from pairquant.evaluation.chains import ChainPlan
from pairquant.evaluation.reasoning import AnswerPlan
from pairquant.jobs.evaluate import activations, chain_prompts
from pairquant.jobs.other_formats import quantize_as
from pairquant.support.errors import ConfigError, PairQuantError, SourceError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("assessment")
    config = pairquant.QuantConfig(group_size=64, rotations=2, recipe=pairquant.PRESETS["rtn"])
    source = save_tiny(root / "source", context=1024)
    pairquant.quantize(source, root / "packed", config, device="cpu")
    (root / "sums.jsonl").write_text('{"problem": "1 + 1?", "answer": 2}\n{"question": "2 + 2?", "answer": "4"}\n')
    return root


@pytest.fixture(scope="module")
def command(directory):
    pytest.importorskip("math_verify")
    arguments = (
        "eval", "packed", "--reference", "source", "--text", TEXT, "--seq-len", 64, "--max-tokens", 256, "--chains", 2,
        "--chain-tokens", 6, "--gsm8k", 3, "--boxed", "sums.jsonl", "--answer-tokens", 5, "--device", "cpu",
        "--json", "result.json",
    )  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "pairquant", *map(str, arguments)],
        cwd=directory, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_every_part_is_printed_within_eighty_columns(command):
    assert command.returncode == 0, command.stderr
    for expected in ("top-1 kept", "the original's chains", "never departs", "gsm8k, 3", "sums.jsonl, 2", "no worse"):
        assert expected in command.stdout
    assert max(map(len, command.stdout.splitlines())) <= 80


def test_every_part_is_in_the_json(command, directory):
    result = json.loads((directory / "result.json").read_text())
    (text,) = result["texts"].values()
    assert len(text["kl_of_windows"]) == 4
    assert text["kl_interval"][0] < text["kl"] < text["kl_interval"][1]
    assert result["chains"]["plan"] == {"count": 2, "tokens": 6, "batch": 8, "seed": 0}
    assert len(result["chains"]["departures"]) == 2
    assert set(result["answers"]) == {"gsm8k", "sums.jsonl"}
    answers = result["answers"]["gsm8k"]
    assert len(answers["model"]["outcomes"]) == len(answers["reference"]["outcomes"]) == 3
    assert 0 <= answers["paired"]["no_worse"] <= 1
    assert result["answer_plan"]["tokens"] == 5
    assert "tasks" not in result
    assert result["bits_per_weight"] < 6


def test_a_model_alone_has_accuracies_and_nothing_to_compare(directory):
    found = pairquant.evaluate(
        directory / "packed", texts=[str(TEXT)], seq_len=32, max_tokens=64, gsm8k=2, answers=AnswerPlan(4), device="cpu"
    )
    assert found["answers"]["gsm8k"]["model"]["problems"] == 2
    assert found["answers"]["gsm8k"]["reference"] is found["answers"]["gsm8k"]["paired"] is None
    (text,) = found["texts"].values()
    assert text["kl"] is text["kl_interval"] is text["kl_by_position"] is None


def test_of_a_model_that_others_quantized_neither_bits_nor_activations_are_claimed(directory, tmp_path):
    pytest.importorskip("compressed_tensors")
    config = pairquant.QuantConfig(group_size=64, recipe=pairquant.PRESETS["rtn"])
    quantize_as("compressed-tensors", directory / "source", tmp_path / "theirs", config, device="cpu")
    result = CliRunner().invoke(
        app,
        ["eval", str(tmp_path / "theirs"), "--text", str(TEXT), "--seq-len", "32", "--max-tokens", "64", "--device", "cpu",
         "--json", str(tmp_path / "found.json")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "unknown bits per weight, on" in result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["bits_per_weight"] is found["activations"] is None
    plain = ModelFiles.find(str(directory / "source"))
    assert activations(plain) == activations(ModelFiles.find(str(directory / "packed"))) == "not rounded"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chains": ChainPlan(1)}, "chains are sampled from the original.*Add --reference"),
        ({"reference": "source", "chains": ChainPlan(1, tokens=1000)}, "--chain-tokens is 1000, allowed: [0-9]+, the"),
        ({"gsm8k": 1, "answers": AnswerPlan(2000)}, "--answer-tokens is 2000, allowed: [0-9]+, the model's context of"),
        ({"gsm8k": 5000}, "GSM8K problems is 5000"),
        ({"boxed": ["lost.jsonl"]}, "problem file 'lost.jsonl' does not exist"),
    ],
)
def test_what_cannot_be_is_told_before_weights_are_read(directory, monkeypatch, options, message):
    monkeypatch.chdir(directory)
    monkeypatch.setattr(pairquant.checkpoint.read.ModelFiles, "model", None)
    with pytest.raises(PairQuantError, match=message):
        pairquant.evaluate("packed", texts=[str(TEXT)], seq_len=32, max_tokens=64, device="cpu", **options)


@pytest.fixture
def beginning(directory, tmp_path):
    """The source, with a tokenizer that puts `<bos>` before a text."""
    shutil.copytree(directory / "source", tmp_path / "beginning")
    beginning_tokenizer().save_pretrained(tmp_path / "beginning")
    return tmp_path / "beginning"


def windows_read(monkeypatch, model, **options):
    """What `evaluate` returns, and the windows that it measured on."""
    seen = []
    measure = pairquant.evaluation.quality.measure
    monkeypatch.setattr("pairquant.evaluation.quality.measure", lambda *a: seen.append((a[1], a[5])) or measure(*a))
    found = pairquant.evaluate(model, texts=[str(TEXT)], seq_len=32, max_tokens=64, device="cpu", **options)
    return found, *seen[0]


def test_windows_begin_with_bos_where_the_tokenizer_has_it(beginning, monkeypatch):
    found, windows, start = windows_read(monkeypatch, beginning)
    assert found["bos"] is True
    assert "begins with <s>" in found["notices"][0]
    assert windows.shape == (2, 32)
    assert (windows == 1).nonzero().tolist() == [[0, 0], [1, 0]]
    assert start == 1  # all but <bos> are predicted
    (text,) = found["texts"].values()
    assert text["tokens"] == 2 * 31


def test_bos_can_be_left_out(beginning, monkeypatch):
    found, windows, _ = windows_read(monkeypatch, beginning, bos="never")
    assert found["bos"] is False
    assert found["notices"] == []
    assert not (windows == 1).any()


def test_the_originals_tokenizer_decides(beginning, directory, monkeypatch):
    """A checkpoint made from a GGUF file by an older version has a tokenizer that lost it."""
    found, windows, _ = windows_read(monkeypatch, directory / "packed", reference=beginning)
    assert found["bos"] is True
    assert (windows[:, 0] == 1).all()
    found, _, _ = windows_read(monkeypatch, beginning, reference=directory / "source")
    assert found["bos"] is False


def test_more_tokens_that_windows_begin_with_are_not_predicted(beginning, monkeypatch):
    beginning_tokenizer("<pad> <s>").save_pretrained(beginning)
    found, windows, start = windows_read(monkeypatch, beginning)
    assert windows[:, :2].tolist() == [[0, 1]] * 2
    assert start == 2
    (text,) = found["texts"].values()
    assert text["tokens"] == 2 * 30


def test_prompts_without_a_chat_template_begin_as_the_tokenizer_has_it():
    (plain,) = chain_prompts(byte_tokenizer(), ChainPlan(1))
    (begun,) = chain_prompts(beginning_tokenizer(), ChainPlan(1))
    assert begun == [1, *plain]


def test_an_unknown_choice_of_bos_is_refused(directory):
    with pytest.raises(ConfigError, match="bos is 'nevre', allowed: auto, never, always; did you mean 'never'"):
        pairquant.evaluate(directory / "packed", bos="nevre")


def test_windows_past_what_the_model_was_made_for_are_said(directory, monkeypatch):
    monkeypatch.chdir(directory)
    found = pairquant.evaluate("source", texts=[str(TEXT)], seq_len=1025, max_tokens=1025, device="cpu")
    assert "windows of 1025 tokens are longer than the 1024" in found["notices"][0]


def test_learned_positions_are_checked_at_the_default_window(tmp_path, monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=288, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(pairquant.checkpoint.read.ModelFiles, "model", None)
    with pytest.raises(ConfigError, match="seq_len is 2048, allowed: up to 64"):
        pairquant.evaluate(tmp_path, texts=[str(TEXT)])


def test_another_models_tokenizer_is_refused(directory, tmp_path, monkeypatch, tiny_tokenizer):
    shutil.copytree(directory / "source", tmp_path / "mixed")
    tiny_tokenizer.save_pretrained(tmp_path / "mixed")
    monkeypatch.setattr(pairquant.checkpoint.read.ModelFiles, "model", None)
    with pytest.raises(SourceError, match="gives token id 3000, but .*mixed.* only has embeddings for ids 0 to 287"):
        pairquant.evaluate(tmp_path / "mixed", texts=[str(TEXT)], seq_len=16)
