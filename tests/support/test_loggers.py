"""Where the log's numbers can be sent."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from pairquant.support.errors import ConfigError
from pairquant.support.loggers import logger, numbers

BLOCK = {
    "event": "block",
    "index": 3,
    "path": "model.layers.3",
    "seconds": 2.5,
    "errors": {"model.layers.3.q_proj": 0.1},
}


def test_a_block_is_reduced_to_its_numbers():
    assert numbers(BLOCK) == {"seconds": 2.5, "error/q_proj": 0.1}
    assert numbers({"event": "start", "blocks": 30}) == {}


def test_no_name_is_no_logger(tmp_path):
    with logger(None, tmp_path / "out") as log:
        assert log is None


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"), logger("tensorbord", tmp_path):
        pass


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(ConfigError, match="pip install wandb"), logger("wandb", tmp_path / "out"):
        pass


def test_tensorboard_gets_a_file(tmp_path):
    pytest.importorskip("tensorboard")
    with logger("tensorboard", tmp_path / "out") as log:
        log(BLOCK)
    assert any((tmp_path / "out-tensorboard").iterdir())


def test_tensorboard_s_numbers_stand_at_their_block(tmp_path, monkeypatch):
    written, closed = [], []
    writer = SimpleNamespace(add_scalar=lambda *entry: written.append(entry), close=lambda: closed.append(True))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda directory: writer))
    with logger("tensorboard", tmp_path / "out") as log:
        log(BLOCK)
    assert written == [("seconds", 2.5, 3), ("error/q_proj", 0.1, 3)]
    assert closed == [True]


def test_wandb_gets_a_run_of_the_output_s_name_that_is_finished_also_after_an_error(tmp_path, monkeypatch):
    begun, logged, finished = [], [], []
    run = SimpleNamespace(log=lambda values, step: logged.append((values, step)), finish=lambda: finished.append(True))
    wandb = SimpleNamespace(init=lambda **settings: begun.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def stopped():
        with logger("wandb", tmp_path / "out") as log:
            log(BLOCK)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert begun == [{"project": "pairquant", "name": "out"}]
    assert logged == [({"seconds": 2.5, "error/q_proj": 0.1}, 3)]
    assert finished == [True]
