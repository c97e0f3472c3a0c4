"""Several processes give what one gives, within rounding, and pieces of work are spread evenly."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from killing import save_source
from ranks_worker import exchange, round_experts
from test_families import make_source
from tiny_models import TEXT

import pairquant
from pairquant.checkpoint.headers import StoredTensors
from pairquant.optimize.ranks import Ranks


@given(units=st.integers(1, 300), unit=st.sampled_from((4, 8, 32)), size=st.integers(1, 8))
def test_every_row_has_one_rank_and_shares_differ_by_one_unit_at_most(units, unit, size):
    shares = [Ranks(rank, size).rows(units * unit, unit) for rank in range(size)]
    assert [0, *(share.stop for share in shares)] == [*(share.start for share in shares), units * unit]
    sizes = [share.stop - share.start for share in shares]
    assert all(count % unit == 0 for count in sizes)
    assert max(sizes) - min(sizes) <= unit


@given(windows=st.integers(1, 30), size=st.integers(1, 8))
def test_every_window_goes_to_one_rank(windows, size):
    tokens = torch.arange(windows)[:, None]
    shares = torch.cat([Ranks(rank, size).windows(tokens) for rank in range(size)])
    assert torch.equal(shares.sort(0).values, tokens)


@given(costs=st.lists(st.integers(1, 10**9), max_size=30), size=st.integers(1, 8))
def test_work_is_dealt_to_one_rank_each_and_evenly(costs, size):
    work = {f"linear {i}": cost for i, cost in enumerate(costs)}
    dealt = Ranks(0, size).dealt(work)
    assert dealt.keys() == work.keys()
    loads = [sum(cost for name, cost in work.items() if dealt[name] == rank) for rank in range(size)]
    assert max(loads) <= sum(costs) / size + max(costs, default=0)
    assert dealt == Ranks(size - 1, size).dealt(work)


def test_rows_and_linears_reach_their_ranks_where_some_have_none(tmp_path):
    assert any(not len(range(16)[Ranks(rank, 3).rows(16, 8)]) for rank in range(3)), "every rank has rows"
    torch.multiprocessing.spawn(exchange, (3, tmp_path / "meeting"), nprocs=3)


def test_activations_of_an_expert_without_tokens_on_one_rank_are_fitted_on_those_of_the_other(tmp_path):
    torch.multiprocessing.spawn(round_experts, (2, tmp_path / "meeting"), nprocs=2)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The same run by one process and by two."""
    root = tmp_path_factory.mktemp("ranks")
    source = save_source(root / "source", blocks=2)
    experts = make_source("Qwen3-MoE", root / "experts")
    command = ["-m", "pairquant", "quantize"]
    options = ["--seq-len", "32", "--calibration", str(TEXT), "--device", "cpu"]
    dense, routed = [*command, str(source), "--group-size", "64"], [*command, str(experts), "--group-size", "32"]
    proxy = ["--samples", "9", "--set", "steps=8", "--set", "head.steps=4", "--head-bits", "6", "--target-bpw", "6"]
    trained = ["--preset", "paper", "--samples", "8", "--end-to-end", "1"]
    for setting in ("epochs=2", "weight_epochs=1", "batch=4", "validation_samples=2"):
        trained += ["--set", f"training.{setting}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    spread = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    runs = {
        "": [*dense, *proxy],
        "trained-": [*dense, *trained],
        "experts-": [*routed, "--samples", "9", "--set", "steps=8"],
    }
    for name, launcher, words in (
        (f"{kind}{number}", launcher, words)
        for kind, words in runs.items()
        for number, launcher in (("one", []), ("two", spread))
    ):
        command = [sys.executable, *launcher, *words, *options, "--output", str(root / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("predicted peak") == 1, "every rank printed"
    return root


@pytest.mark.parametrize("kind", ["", "trained-", "experts-"])
def test_two_processes_agree_with_one(outputs, kind):
    errors = {}
    for name in (f"{kind}one", f"{kind}two"):
        report = json.loads((outputs / name / "pairquant.json").read_text())
        errors[name] = {path: entry["error"] for path, entry in report["linears"].items()}
    alone, together = errors.values()
    assert alone.keys() == together.keys()
    assert sum(together.values()) == pytest.approx(sum(alone.values()), rel=0.05)
    one, two = (StoredTensors.of_directory(outputs / name) for name in errors)
    assert one.fields == two.fields
    assert all(torch.equal(one.load(n), two.load(n)) for n in one.fields if n.endswith(".pairs"))


def test_two_processes_train_the_whole_model(outputs):
    """Their steps see other windows than those of one process, whose block-wise training was another one already."""
    curves = [
        json.loads((outputs / f"trained-{n}" / "pairquant.json").read_text())["end_to_end_kl"] for n in ("one", "two")
    ]
    assert all(after < 0.9 * before for before, after in curves)
    assert curves[1] == pytest.approx(curves[0], rel=0.5)


def test_what_two_processes_write_is_near_the_original(outputs):
    found = pairquant.evaluate(outputs / "two", reference=outputs / "source", texts=(str(TEXT),), seq_len=64)
    alone = pairquant.evaluate(outputs / "one", reference=outputs / "source", texts=(str(TEXT),), seq_len=64)
    two, one = (next(iter(result["texts"].values()))["kl"] for result in (found, alone))
    assert two == pytest.approx(one, rel=0.15)
    assert not [path.name for path in outputs.iterdir() if path.name.startswith(".")], "a journal is left"
