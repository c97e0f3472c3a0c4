"""Several models beside their original."""

import json

import pytest
from tiny_models import TEXT, save_tiny
from typer.testing import CliRunner

import pairquant
from pairquant.cli.app import app
from pairquant.evaluation.chains import ChainPlan
from pairquant.evaluation.reasoning import AnswerPlan
from pairquant.evaluation.results import Comparison
from pairquant.evaluation.speed import Workload
from pairquant.jobs.compare import compare
from pairquant.jobs.evaluate import SAMPLING
from pairquant.support.errors import ConfigError, PairQuantError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A source, and two models made from it, the second much further away."""
    root = tmp_path_factory.mktemp("compare")
    save_tiny(root / "source", context=512)
    for name, bits in (("near", 8), ("far", 2)):
        pairquant.quantize(
            root / "source", root / name, pairquant.QuantConfig(preset="rtn", bits=bits, group_size=32), device="cpu"
        )
    return root


@pytest.fixture(scope="module")
def result(directory):
    rows, parts = [], []

    def on_part(name, count):
        parts.append(name)
        return lambda: None

    found = compare(
        directory / "source", [directory / "far", directory / "near"], [str(TEXT)], seq_len=64, max_tokens=1024,
        chains=ChainPlan(3, tokens=8), device="cpu", on_row=rows.append, on_part=on_part,
    )  # fmt: skip
    assert Comparison.from_dict(found).rows == rows
    assert sum(SAMPLING in part for part in parts) == 1, "chains are sampled once for all"
    return found


def test_every_row_is_what_eval_says_of_that_model(result, directory):
    original, far, _ = result["rows"]
    assert original["evaluation"]["reference"] is None
    alone = pairquant.evaluate(
        directory / "far", directory / "source", [str(TEXT)], seq_len=64, max_tokens=1024,
        chains=ChainPlan(3, tokens=8), device="cpu",
    )  # fmt: skip
    assert far["evaluation"]["texts"] == alone["texts"]
    assert far["evaluation"]["chains"] == alone["chains"]
    assert "chains" not in original["evaluation"]
    assert far["size_bytes"] < original["size_bytes"]
    assert original["quantized_in_s"] is None
    assert far["quantized_in_s"] >= 0


def test_the_closest_is_named_with_its_lead(result, directory):
    (ranking,) = result["closest"].values()
    assert ranking["model"] == str(directory / "near")
    (gap,) = ranking["ahead_of"].values()
    kl = [row["evaluation"]["texts"][str(TEXT)]["kl"] for row in result["rows"][1:]]
    assert gap["kl"] == pytest.approx(kl[0] - kl[1], rel=1e-4)
    assert 0 < gap["interval"][0] < gap["kl"] < gap["interval"][1]


def test_along_chains_the_closest_is_named_too_each_chain_counted_by_its_tokens(result, directory):
    ranking = result["closest_along_chains"]
    assert ranking["model"] == str(directory / "near")
    kl = [row["evaluation"]["chains"]["kl"] for row in result["rows"][1:]]
    assert ranking["ahead_of"][str(directory / "far")]["kl"] == pytest.approx(kl[0] - kl[1], rel=1e-4)


def test_the_command_prints_a_table_and_writes_json(directory):
    arguments = [
        "compare", str(directory / "source"), str(directory / "near"), str(directory / "far"), "--text", str(TEXT),
        "--seq-len", "64", "--max-tokens", "512", "--chains", "2", "--chain-tokens", "6", "--gsm8k", "1",
        "--answer-tokens", "4", "--device", "cpu", "--json", str(directory / "out.json"),
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    for expected in (
        "source",
        "near",
        "far",
        "bits per weight",
        "perplexity",
        "closest",
        "+",
        "along chains",
        "gsm8k, 1",
    ):
        assert expected in done.output
    assert [row["name"] for row in json.loads((directory / "out.json").read_text())["rows"]] == arguments[1:4]


@pytest.mark.parametrize(
    ("models", "message"),
    [([], "no models"), (["near", "near"], "given twice"), (["source"], "source' is given twice")],
)
def test_what_cannot_be_compared_is_refused(directory, models, message):
    with pytest.raises(ConfigError, match=message):
        compare(directory / "source", [directory / name for name in models])


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (["near"], {"texts": ["lost.txt"]}, "lost.txt"),
        (["near"], {"seq_len": 1}, "seq_len 1"),
        (["near"], {"answers": AnswerPlan(600), "gsm8k": 1}, "--answer-tokens is 600"),
        (["near", "lost"], {}, "lost"),
    ],
)
def test_what_is_wrong_with_any_model_is_told_before_the_first_is_loaded(directory, models, options, message):
    with pytest.raises(PairQuantError, match=message):
        compare(
            directory / "source", [directory / name for name in models], chains=ChainPlan(2, tokens=8), device="cpu",
            on_part=lambda *_: pytest.fail("evaluated"), **options,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "message"), [("vlm", "did you mean 'vllm'"), ("vllm", "none are asked for|not installed")]
)
def test_the_engine_is_that_of_eval(directory, engine, message):
    with pytest.raises(ConfigError, match=message):
        compare(directory / "source", [directory / "near"], engine=engine, on_part=lambda *_: pytest.fail("evaluated"))


def test_a_workload_that_is_too_long_is_refused_before_anything_is_evaluated(directory):
    with pytest.raises(ConfigError, match="512"):
        compare(
            directory / "source", [directory / "near"], speed=Workload(), on_part=lambda *_: pytest.fail("evaluated")
        )
