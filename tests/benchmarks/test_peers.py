"""`benchmarks/bench_peers.py`: its table, what becomes of a peer that fails, and that finished rows are not run again."""

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TEXT, beginning_tokenizer, byte_tokenizer, save_tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_peers
from bench_peers import PEERS, Scale, Unable, finished, interpreter, last_error, last_line, rows_of, table
from peers import biased
from peers.runners import plain
from peers.table import FOLDER, Peer

from pairquant.checkpoint.read import ModelFiles
from pairquant.evaluation.chains import ChainPlan
from pairquant.report.results import read as read_for_report
from pairquant.support.errors import ConfigError

OURS = next(peer for peer in PEERS if peer.name == "rtn")


def test_the_table_names_scripts_and_pinned_requirements_that_exist():
    assert len({peer.name for peer in PEERS}) == len(PEERS), "two peers share a name"
    for peer in PEERS:
        compile(peer.script.read_text(), peer.script, "exec")
        if peer.requirements:
            lines = peer.requirements.read_text().split()
            assert lines, f"{peer.requirements} is empty"
            assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), f"{peer.name}: {lines}"
    environments = {peer.environment for peer in PEERS} - {None}
    assert environments == {file.stem for file in (FOLDER / "requirements").glob("*.txt")}


def options(folder: Path, **others) -> argparse.Namespace:
    settings = {
        "device": "cpu",
        "quick": True,
        "retry": False,
        "keep": False,
        "site": None,
        "minutes": None,
        "windows": None,
        "chains": None,
        "group_size": None,
    }
    return argparse.Namespace(**{**settings, "work": folder, **others})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("peers")


@pytest.fixture(scope="module")
def model(folder):
    return save_tiny(folder / "tiny", context=512)


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    monkeypatch.setattr(bench_peers, "CALIBRATION", (str(TEXT),))
    monkeypatch.setattr("setting.EVALUATION", {name: (str(TEXT), 2) for name in ("wikitext2-test", "gsm8k-test")})
    monkeypatch.setattr(bench_peers, "QUICK", Scale(2, 16, 2, 16, ChainPlan(2, 6)))


def test_a_failing_peer_is_a_row_and_the_next_one_runs_and_rows_last(folder, model, capsys):
    results = folder / "rows.jsonl"
    here = Peer("here", "Here", "round to nearest", "ours", options={"preset": "rtn"}, group_size=32)
    absent = Peer("absent", "Absent", "none", "nf4", environment="bitsandbytes")
    rounded = replace(here, name="rounded", options={"preset": "rtn", "activations": "int4"})
    wanted = [(absent, 4), (here, 4), (rounded, 4)]
    bench_peers.compare(wanted, options(folder, site=folder / "nowhere"), results, model)
    rows = rows_of(results, "tiny", bench_peers.QUICK)
    assert "bitsandbytes is not there" in rows["absent", 4]["reason"]
    measured = rows["here", 4]
    assert measured["quick"] is True
    assert measured["bits_per_weight"] > 4
    assert 0 < measured["wikitext2-test"]["kl"] < 10
    assert len(measured["gsm8k-test"]["kl_of_windows"]) == 2
    assert measured["chains"]["chains"] == 2
    assert measured["chains"]["kl"] > 0
    assert [rows[name, 4]["activations"] for name in ("here", "rounded")] == ["not rounded", "int4"]
    assert rows["rounded", 4]["wikitext2-test"]["kl"] > 1.2 * measured["wikitext2-test"]["kl"]
    assert not list(folder.rglob("plain")), "plain models are left behind"

    before = results.read_text()
    bench_peers.compare(wanted, options(folder), results, model)
    assert results.read_text() == before, "finished rows were run again"
    assert finished(results, "tiny", bench_peers.QUICK, retry=True) == {("here", 4), ("rounded", 4)}
    assert finished(results, "another model", bench_peers.QUICK, retry=False) == set()
    assert finished(results, "tiny", bench_peers.FULL, retry=False) == set(), "measured on less text"


def measured_row(peer: str, *kl: float) -> dict:
    text = {
        "tokens": 9,
        "perplexity": 2.0,
        "kl": sum(kl) / len(kl),
        "kl_interval": [0.1, 0.2],
        "kl_of_windows": kl,
        "top1": 0.5,
    }
    facts = {
        "peer": peer,
        "bits": 4,
        "group_size": 64,
        "bits_per_weight": 4.3,
        "seconds": 3.0,
        "model": "m",
        "windows": [None, 2048],
    }
    return {**facts, "device": "a CPU", "wikitext2-test": text, "gsm8k-test": text}


def test_rows_are_read_by_the_report(tmp_path):
    file = tmp_path / "peers.json"
    failed = {"peer": "original", "bits": 4, "model": "m", "reason": "no GPU"}
    rows = {("fast", 4): measured_row("fast", 0.1, 0.3), ("original", 4): failed}
    file.write_text(json.dumps(bench_peers.as_comparison(rows)))
    (found,) = read_for_report([file], {}).evaluations
    assert found.name == "fast"
    assert (found.bits_per_weight, found.activations, found.quantized_in_s) == (4.3, "not rounded", 3.0)
    assert found.texts["wikitext2-test"].kl == pytest.approx(0.2)


def test_the_table_ranks_and_says_what_was_not_run(tmp_path):
    failed = {"peer": "original", "bits": 4, "model": "m", "windows": [None, 2048], "reason": "RuntimeError: no | GPU"}
    rows = [measured_row("rtn", 0.9, 0.9), failed, measured_row("rtn", 0.3, 0.5), measured_row("fast", 0.1, 0.2)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    lines = table(rows_of(file, "m"), 4).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == [
        "PairQuant `fast`",
        "PairQuant `rtn`",
        "ParoQuant, its authors'",
    ]
    assert "closest" in lines[0]
    assert "0.2500 ± " in lines[1], "of two rows of one peer the last one counts"
    assert "not run: RuntimeError: no \\| GPU (needs a GPU, nvcc)" in lines[2]


def test_chains_are_told_of_rows_that_followed_the_same_ones(tmp_path):
    plan = {"count": 32, "tokens": 1024, "batch": 32, "seed": 0}
    along = {"kl": 0.25, "kl_interval": [0.2, 0.3], "departure_median": None, "plan": plan}
    same = {**measured_row("fast", 0.1, 0.2), "chains": along}
    fewer = {**measured_row("rtn", 0.3, 0.4), "chains": {**along, "plan": {**plan, "count": 2}}}
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, [same, fewer, measured_row("best", 0.5, 0.6)])))
    rows = rows_of(file, "m")
    cells = [[cell.strip() for cell in line.split("|")[11:13]] for line in table(rows, 4).splitlines()[2:]]
    assert cells == [["0.2500 ± 0.0500", "–"], ["", ""], ["", ""]]
    first, *others = bench_peers.as_comparison(rows)["rows"]
    assert first["evaluation"]["chains"] == along
    assert not any("chains" in row["evaluation"] for row in others)
    assert finished(file, "m", bench_peers.FULL, retry=False) == {("fast", 4)}, "the others followed no such chains"

    with file.open("a") as more:  # a later row along fewer chains hides nothing
        more.write("\n" + json.dumps({**measured_row("fast", 0.7, 0.7), "chains": fewer["chains"]}))
    assert rows_of(file, "m")["fast", 4]["chains"] == along


def test_what_the_original_has_no_room_for_is_told_before_any_peer_runs(folder, model, monkeypatch):
    monkeypatch.setattr(bench_peers, "run_peer", lambda *_: pytest.fail("ran"))
    chosen = options(folder, chains=[2, 500])
    with pytest.raises(ConfigError, match="--chains is 500, allowed: "):
        bench_peers.compare([(OURS, 4)], chosen, folder / "none.jsonl", model)


def test_the_error_is_found_among_a_log_and_loses_its_folders():
    log = (
        "Loading:  3%\rLoading: 90%\nTraceback …\n  File x\nImportError: /home/me/.cache/a.so: cannot open\n[2m[0m bye"
    )
    assert last_error(log) == "ImportError: …/a.so: cannot open"
    assert last_error("") == "no output"
    assert (
        last_line("start\n 50%|████      | 15/30\r 53%|████▎     | 16/30 [07:37, 27.21s/it]\n")
        == "53%| | 16/30 [07:37, 27.21s/it]"
    )


def test_a_group_size_that_is_asked_for_goes_to_all_that_have_groups(folder, model):
    def group_size(peer: Peer, **asked) -> int:
        return bench_peers.job_of(peer, 4, options(folder, **asked), model, folder / "text.safetensors").group_size

    trellis = next(peer for peer in PEERS if peer.name == "exllamav3")
    assert [group_size(OURS), group_size(OURS, group_size=128)] == [64, 128]
    assert group_size(trellis, group_size=128) == 0


def test_a_runner_that_raises_is_reported_with_its_error(folder, model, tmp_path, monkeypatch):
    (tmp_path / "runners").mkdir()
    (tmp_path / "runners" / "wrong.py").write_text("print('working')\nraise RuntimeError('no GPU here')\n")
    monkeypatch.setattr("peers.table.FOLDER", tmp_path)
    wrong = Peer("wrong", "Wrong", "none", "wrong")
    job = bench_peers.job_of(wrong, 4, options(folder), model, folder / "text.safetensors")
    with pytest.raises(Unable, match="^RuntimeError: no GPU here$"):
        bench_peers.run_peer(wrong, job, None, None)


def test_a_runner_that_takes_too_long_says_how_far_it_got_and_leaves_only_its_log(folder, model, tmp_path, monkeypatch):
    (tmp_path / "runners").mkdir()
    (tmp_path / "runners" / "slow.py").write_text(
        "import tempfile, time\n"
        "kept = tempfile.mkdtemp()\n"
        "open('here', 'w').close()\n"
        "print('16 of 30', flush=True)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr("peers.table.FOLDER", tmp_path)
    slow = Peer("slow", "Slow", "none", "slow")
    job = bench_peers.job_of(slow, 4, options(tmp_path), model, folder / "text.safetensors")
    with pytest.raises(Unable, match=r"not done after 0.05 minutes, the last words: 16 of 30"):
        bench_peers.run_peer(slow, job, None, 3)
    assert sorted(file.name for file in Path(job.output).parent.iterdir()) == ["job.json", "log.txt"]


def test_peers_run_in_a_site_before_this_interpreters_packages(tmp_path):
    peer = next(peer for peer in PEERS if peer.name == "autoround")
    (tmp_path / "auto-round").mkdir()
    python, variables = interpreter(peer, tmp_path)
    assert python == Path(sys.executable)
    assert variables["PYTHONPATH"].split(":")[0] == str(tmp_path / "auto-round")
    assert interpreter(OURS, tmp_path)[1].get("PYTHONPATH") != variables["PYTHONPATH"]


def test_effective_weights_are_read_off_answers_without_the_bias():
    linear = torch.nn.Linear(6, 4)
    assert torch.allclose(plain.effective_weight(linear, 6, "cpu", torch.float32), linear.weight, atol=1e-6)


def test_a_plain_model_lacks_no_linear_and_has_finite_weights(folder, model):
    job = bench_peers.job_of(OURS, 4, options(folder), model, folder / "none.safetensors")
    weights = {path: linear.weight.detach() for path, linear in plain.linears_of(job.load()).items()}
    first = next(iter(weights))
    outcome = plain.Outcome(weights, 1.0, 4.5, 32, {})
    plain._save(job, outcome)
    with pytest.raises(ValueError, match=re.escape(first)):
        plain._save(job, plain.Outcome({p: w for p, w in weights.items() if p != first}, 1.0, 4.5, 32, {}))
    with pytest.raises(ValueError, match="not finite"):
        plain._save(job, plain.Outcome({**weights, first: weights[first] * float("nan")}, 1.0, 4.5, 32, {}))


def test_a_plain_model_that_does_not_compute_what_the_quantizer_does_is_refused(folder, model):
    calibration = folder / "text.safetensors"
    bench_peers.write_calibration(byte_tokenizer(), bench_peers.QUICK, calibration)
    job = bench_peers.job_of(OURS, 4, options(folder), model, calibration)
    own = job.load(torch.float32)
    logits = plain.first_logits(own, job.windows)
    assert logits.shape == (16, own.config.vocab_size)
    weights = {path: linear.weight.detach() for path, linear in plain.linears_of(own).items()}
    assert plain._save(job, plain.Outcome(weights, 1.0, 4.5, 32, {}, logits=logits)) < 1e-6
    norm = next(name for name in own.state_dict() if "norm" in name)
    misread = {norm: 1.5 * own.state_dict()[norm]}
    with pytest.raises(ValueError, match="the plain model's logits differ"):
        plain._save(job, plain.Outcome(weights, 1.0, 4.5, 32, misread, logits=logits))


def test_the_biased_model_has_biases_and_outliers_that_rounding_feels(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["biased.py", str(tmp_path)])
    biased.main()
    model = ModelFiles.find(str(tmp_path)).model(torch.float32, torch.device("cpu"))
    attention = model.model.layers[0].self_attn
    assert all(0.8 < layer.bias.std() < 1.2 for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    weights = model.model.layers[0].input_layernorm.weight
    assert weights.max() > 5 * weights.median()
    tokens = ModelFiles.find(str(tmp_path)).tokenizer()("é b")["input_ids"]
    assert len(tokens) == 4, "a token for each byte"


def test_stored_bits_count_scales_zero_points_and_rotations():
    assert plain.affine_bits(4, 64, zero_point=False) == 4.25
    assert plain.affine_bits(4, 64, zero_point=True) == 4.3125
    assert plain.rotation_bits([torch.zeros(100, 64)], rotations=8) == (8 * 24 + 16) / 100


def test_peers_are_given_windows_that_begin_with_bos_where_the_tokenizer_has_it(tmp_path):
    for tokenizer, begins in ((beginning_tokenizer(), True), (byte_tokenizer(), False)):
        bench_peers.write_calibration(tokenizer, bench_peers.QUICK, tmp_path / "calibration.safetensors")
        for windows in load_file(tmp_path / "calibration.safetensors").values():
            assert windows.shape == (2, 16)
            assert ((windows[:, 0] == 1).all().item(), (windows[:, 1:] == 1).any().item()) == (begins, False)
        for windows in bench_peers.evaluation_windows(tokenizer, 16, 2).values():
            assert (windows[:, 0] == 1).all().item() is begins
