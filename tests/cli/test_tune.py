"""`pairquant tune`: a row for each launch, and where the choices are kept."""

import pytest
import torch
from typer.testing import CliRunner

from pairquant.cli import app
from pairquant.jobs import tune as job
from pairquant.kernels import availability
from pairquant.kernels.run import table
from pairquant.kernels.run.table import TOKENS, Dense
from pairquant.support import devices
from pairquant.support.errors import ResourceError


def test_a_row_for_each_launch_and_the_place_of_the_table(monkeypatch, tmp_path):
    """The measuring itself needs a GPU; what it hands over is given here."""
    launches = [((128, 64, 64), 128, {tokens: Dense(16) for tokens in TOKENS}), ((192,), 96, {TOKENS[0]: Dense(32)})]
    asked = []
    monkeypatch.setattr(job, "tune", lambda model, device: asked.append((model, device)) or iter(launches))
    monkeypatch.setattr(availability, "device_class", lambda device: f"class of {device}")
    monkeypatch.setattr(devices, "resolve_device", lambda name: torch.device(name))
    monkeypatch.setattr(table.Path, "home", lambda: tmp_path)
    done = CliRunner().invoke(app, ["tune", "model", "--device", "cuda:1"], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    assert asked == [("model", "cuda:1")]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["128+64+64", "128", str(TOKENS[0]), "dense", "16"] in rows
    assert [[str(tokens), "dense", "16"] for tokens in TOKENS[1:]] == [
        row for row in rows if row[1:] == ["dense", "16"]
    ]
    assert ["192", "96", str(TOKENS[0]), "dense", "32"] in rows
    assert max(map(len, done.stdout.splitlines())) <= 80
    kept = str(table.user_path("class of cuda:1"))
    assert f"kept in {kept}" in done.stdout.replace("\n", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_what_is_missing():
    done = CliRunner().invoke(app, ["tune", "model"])
    assert isinstance(done.exception, ResourceError)
    assert "needs an NVIDIA GPU" in str(done.exception)
