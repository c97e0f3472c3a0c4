"""Publishing on a hub: the real client against a server on this machine."""

import functools
import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
from fake_hub import fake_hub
from huggingface_hub import ModelCard
from tiny_models import TEXT, save_tiny

import pairquant
from pairquant.checkpoint.describe import readme_digest
from pairquant.checkpoint.read import Checkpoint, ModelFiles
from pairquant.hub import upload
from pairquant.hub.card import MARKER, ORIGINAL

RESULTS = {
    "model": "out", "reference": "/home/somebody/original",
    "texts": {"gsm8k-test": {"tokens": 12345, "perplexity": 6.78901, "kl": 0.01234, "top1": 0.98765}, "wiki|text.txt": {"tokens": 9, "perplexity": 2.0, "kl": None, "top1": None}},
    "bits_per_weight": 4.6, "device": "one CPU", "versions": {"torch": "2.13"},
}  # fmt: skip


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    root = tmp_path_factory.mktemp("push")
    config = pairquant.QuantConfig(
        preset="quick", group_size=32, rotations=2, samples=4, seq_len=32, calibration=(str(TEXT),)
    )
    pairquant.quantize(save_tiny(root / "source"), root / "out", config, device="cpu")
    return root / "out"


@pytest.fixture
def checkpoint(quantized, tmp_path):
    return shutil.copytree(quantized, tmp_path / "out")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with fake_hub({"org/original": "apache-2.0"}) as hub:
        log_in(monkeypatch, hub.address)
        yield hub


def log_in(monkeypatch, address, token="hf_writer"):
    monkeypatch.setattr(upload, "HfApi", functools.partial(huggingface_hub.HfApi, address, token))


def card_of(hub, name):
    return ModelCard(hub.repos[name]["files"]["README.md"].decode())


def test_every_file_arrives_with_a_card(checkpoint, hub, tmp_path):
    (checkpoint / ".hidden").write_text("")
    results = tmp_path / "results.json"
    results.write_text(json.dumps(RESULTS))
    address = pairquant.push(checkpoint, "tiny-PARO", results=results, base_model="org/original")
    assert address == f"{hub.address}/ann/tiny-PARO"
    repo = hub.repos["ann/tiny-PARO"]
    assert not repo["private"]
    assert repo["files"].keys() == {file.name for file in checkpoint.iterdir()} - {".hidden"}
    told = ("config.json", "pairquant.json")
    assert all(c == (checkpoint / n).read_bytes() for n, c in repo["files"].items() if n not in told)
    for name in told:  # the same, without this machine's paths
        mine, public = (checkpoint / name).read_text(), repo["files"][name].decode()
        assert str(TEXT.parent) in mine
        assert str(TEXT.parent) not in public
        assert json.loads(public).keys() == json.loads(mine).keys()
        assert TEXT.name in public

    card = card_of(hub, "ann/tiny-PARO")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "org/original"
    assert card.data.base_model_relation == "quantized"
    assert card.data.library_name == "transformers"
    assert {"paroquant", "4-bit"} <= set(card.data.tags)
    for expected in (
        "# ann/tiny-PARO",
        "4 bits, groups of 32, 2 rotations",
        f"{Checkpoint.open(ModelFiles.find(str(checkpoint))).bits_per_weight():.2f} in 14 linear layers",
        "| preset | quick |",
        "| calibration | text.txt, 4 × 32 tokens |",
        "| gsm8k-test | 12,345 | 6.789 | 0.0123 | 0.9877 |",
        "| wiki\\|text.txt | 9 | 2.000 |  |  |",
        "against original.",
        "vllm serve ann/tiny-PARO",
        'from_pretrained("ann/tiny-PARO"',
        "pairquant chat ann/tiny-PARO",
        '"rounding": "gptq"',
    ):
        assert expected in card.text, card.text
    assert "/home/somebody" not in card.text


def test_without_an_original_or_results_the_card_is_still_whole(checkpoint, hub):
    pairquant.push(checkpoint, "team/tiny", private=True)
    assert hub.repos["team/tiny"]["private"]
    card = card_of(hub, "team/tiny")
    assert card.data.license == "unknown"
    assert card.data.base_model is None
    assert "## Results" not in card.text


def test_a_public_repository_is_not_used_for_a_private_model(checkpoint, hub):
    hub.repos["ann/tiny"] = {"private": False, "files": {}}
    with pytest.raises(pairquant.PairQuantError, match="is there already, and is public"):
        pairquant.push(checkpoint, "tiny", private=True)
    assert not hub.repos["ann/tiny"]["files"]


def test_the_source_is_the_base_model_if_it_came_from_the_hub(checkpoint, hub):
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["provenance"]["source"] = "org/original"
    (checkpoint / "config.json").write_text(json.dumps(config))
    pairquant.push(checkpoint, "tiny")
    assert card_of(hub, "ann/tiny").data.base_model == "org/original"
    assert card_of(hub, "ann/tiny").data.license == "apache-2.0"
    pairquant.push(checkpoint, "tiny", base_model="org/gone", license="mit")
    assert card_of(hub, "ann/tiny").data.base_model == "org/gone"
    assert card_of(hub, "ann/tiny").data.license == "mit"
    pairquant.push(checkpoint, "tiny", base_model="org/gone")
    assert card_of(hub, "ann/tiny").data.license == "unknown"


def test_a_card_that_somebody_wrote_is_kept(checkpoint, hub):
    pairquant.push(checkpoint, "tiny")
    readme = checkpoint / "README.md"
    rendered = readme.read_text()
    pairquant.push(checkpoint, "other")
    assert "# ann/other" in readme.read_text(), "ours is rendered anew"
    readme.write_text(rendered.replace(MARKER, "") + "and a word of mine\n")
    pairquant.push(checkpoint, "tiny")
    assert hub.repos["ann/tiny"]["files"]["README.md"].decode().endswith("and a word of mine\n")


SOURCE_CARD = """---
license: llama3.1
language: [en, de]
tags: [chat, quantized]
base_model: org/older
model-index:
- name: original
  results: []
---
# The original

{{ not a template }} was trained with care.
"""


def with_source_card(checkpoint, content):
    """As `quantize` leaves it: the source's card, and its digest in the report."""
    (checkpoint / "README.md").write_text(content)
    report = json.loads((checkpoint / "pairquant.json").read_text())
    (checkpoint / "pairquant.json").write_text(json.dumps(report | {"readme_sha256": readme_digest(checkpoint)}))


def test_the_sources_own_card_stays_below_ours(checkpoint, hub):
    with_source_card(checkpoint, SOURCE_CARD)
    for _ in range(2):  # rendered from the source's card, then from the rendered one
        pairquant.push(checkpoint, "tiny")
        card = card_of(hub, "ann/tiny")
        assert card.data.license == "llama3.1"
        assert card.data.language == ["en", "de"]
        assert card.data.base_model == "org/older"
        assert card.data.tags == ["chat", "quantized", "paroquant", "pairquant", "4-bit"]
        assert "model-index" not in card.data.to_dict()
        ours, theirs = card.text.split(ORIGINAL)
        assert "# ann/tiny" in ours
        assert theirs.strip() == "# The original\n\n{{ not a template }} was trained with care."
    pairquant.push(checkpoint, "tiny", base_model="org/original")
    card = card_of(hub, "ann/tiny")
    assert (card.data.base_model, card.data.base_model_relation) == ("org/original", "quantized")
    assert card.data.license == "apache-2.0"


@pytest.mark.parametrize("front", ["", "---\n- a list\n---\n", "---\na: [\n---\n"])
def test_a_source_card_without_front_matter_or_with_a_broken_one(checkpoint, hub, front):
    with_source_card(checkpoint, f"{front}# The original\n")
    pairquant.push(checkpoint, "tiny")
    card = card_of(hub, "ann/tiny")
    assert card.data.license == "unknown"
    assert card.text.split(ORIGINAL)[1].strip() == "# The original"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/b/c", "hub name 'a/b/c' is not allowed"),
        ("no spaces", "hub name 'no spaces' is not allowed"),
        ("taem/tiny", "belongs to 'taem'.*allowed: ann, team; did you mean 'team'"),
        ("readers/tiny", "belongs to 'readers'"),
    ],
)
def test_names_are_checked(hub, name, message):
    with pytest.raises(pairquant.PairQuantError, match=message):
        upload.require_writable(name)


@pytest.mark.parametrize(
    ("token", "message"),
    [("hf_reader", "token 'laptop' may only read"), ("hf_old", "the hub refused. Invalid user token")],
)
def test_tokens_are_checked(hub, monkeypatch, token, message):
    log_in(monkeypatch, hub.address, token)
    with pytest.raises(pairquant.PairQuantError, match=message):
        upload.require_writable("tiny")


def test_a_hub_that_is_not_there_is_named(hub, monkeypatch):
    log_in(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(pairquant.PairQuantError, match=r"cannot be reached \(.*refused.*HF_ENDPOINT"):
        upload.require_writable("tiny")


def test_being_offline_or_nobody_is_named(monkeypatch, tmp_path):
    log_in(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(pairquant.PairQuantError, match="HF_HUB_OFFLINE"):
        upload.require_writable("tiny")
    log_in(monkeypatch, "http://127.0.0.1:9", token=None)
    monkeypatch.setattr(huggingface_hub.hf_api, "get_token", lambda: None)
    with pytest.raises(pairquant.PairQuantError, match="hf auth login"):
        upload.require_writable("tiny")


def test_what_is_no_checkpoint_or_no_result_is_refused(checkpoint, hub, tmp_path):
    with pytest.raises(pairquant.PairQuantError, match="is no directory"):
        pairquant.push("org/model", "tiny")
    plain = save_tiny(tmp_path / "plain")
    with pytest.raises(pairquant.PairQuantError, match="not quantized with pairwise rotations"):
        pairquant.push(plain, "tiny")
    for content in ("not JSON", "{}", '{"texts": {"a": {"tokens": "many"}}}'):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(pairquant.PairQuantError, match="pairquant eval --json"):
            pairquant.push(checkpoint, "tiny", results=tmp_path / "results.json")
    assert not hub.repos


def command(hub, directory, *arguments, token="hf_writer"):
    environment = os.environ | {
        "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(directory / "home"),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "pairquant", *map(str, arguments)],
        cwd=directory, capture_output=True, text=True, check=False, timeout=300, env=environment,
    )  # fmt: skip


def quantize(hub, directory, name, **options):
    return command(
        hub, directory, "quantize", "source", "--output", "out", "--preset", "rtn", "--group-size", "auto",
        "--device", "cpu", "--push-to-hub", name, "--private", **options,
    )  # fmt: skip


def test_quantize_and_push_in_one_command(hub, tmp_path):
    save_tiny(tmp_path / "source")
    hub.refuses_commits = True
    done = quantize(hub, tmp_path, "team/tiny")
    assert done.returncode == 1
    assert "Storage quota exceeded" in done.stderr
    assert "The checkpoint stands; to try again: pairquant push out team/tiny --private" in done.stderr
    hub.refuses_commits = False
    done = command(hub, tmp_path, "push", "out", "team/tiny", "--private")
    assert done.returncode == 0, done.stderr
    assert f"out is at {hub.address}/team/tiny" in done.stdout
    assert hub.repos["team/tiny"]["private"]
    assert {"model.safetensors", "README.md", "config.json"} <= hub.repos["team/tiny"]["files"].keys()


def test_quantize_finds_out_before_any_work_that_it_cannot_push(hub, tmp_path):
    done = quantize(hub, tmp_path, "tiny", token="hf_reader")  # the source does not even exist
    assert done.returncode == 1
    assert "may only read" in done.stderr
    assert "Traceback" not in done.stderr
