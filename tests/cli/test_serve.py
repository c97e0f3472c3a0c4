"""`pairquant serve` up to where it becomes the engine's server."""

import pytest
from tiny_models import save_tiny
from typer.testing import CliRunner

from pairquant.cli.app import app
from pairquant.engines import server
from pairquant.support.errors import ConfigError, SourceError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    save_tiny(root / "model")
    broken = save_tiny(root / "broken")
    (broken / "chat_template.jinja").write_text("{{ messages[0].absent.content }}")
    custom = root / "custom"
    custom.mkdir()
    (custom / "config.json").write_text('{"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig"}}')
    (custom / "odd.py").write_text("raise SystemExit('code was run')")
    return root


@pytest.fixture
def started(monkeypatch):
    """The commands that processes would have become."""
    commands = []
    monkeypatch.setattr(server.Command, "replace_process", lambda self: commands.append(self))
    return commands


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["modle"], SourceError, "did you mean 'model'"),
        (["model", "--engine", "vlm"], ConfigError, "did you mean 'vllm'"),
        (["model", "--engine", "transformers", "--dtype", "bf16"], ConfigError, "did you mean 'bfloat16'"),
        (["model", "--engine", "transformers", "--tensor-parallel", "2"], ConfigError, "Use --engine vllm"),
        (
            ["model", "--engine", "transformers", "--max-model-len", "999"],
            ConfigError,
            "up to 128, the model's context",
        ),
        (["model", "--max-model-len", "0"], ConfigError, "max_model_len 0; allowed: 1 or more"),
        (["model", "--engine", "transformers", "--host", "no such host"], ConfigError, "cannot listen on"),
        (["broken", "--engine", "transformers"], SourceError, "chat template is broken in line 1"),
        (["custom", "--engine", "transformers"], SourceError, "--trust-remote-code"),
    ],
)
def test_mistakes_are_told_before_anything_starts(directory, monkeypatch, started, arguments, error, message):
    monkeypatch.chdir(directory)
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert started == []


def test_the_process_becomes_the_server_with_what_follows_the_dashes(directory, monkeypatch, started):
    monkeypatch.chdir(directory)
    monkeypatch.setattr(server, "check_address", lambda host, port: None)
    arguments = ["model", "--engine", "transformers", "--port", "8123", "--", "--default-seed", "3"]
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 0, result.output
    (command,) = started
    assert command.arguments[-2:] == ["--default-seed", "3"]
    assert "serves model 'model' at http://127.0.0.1:8123/v1" in result.output
    assert "no chat template" in result.output


def test_help_has_groups_and_an_example():
    shown = CliRunner().invoke(app, ["serve", "--help"]).output
    assert all(part in shown for part in ("Engine", "Address", "Example: pairquant serve"))
