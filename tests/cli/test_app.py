"""What all commands share: the version, the help, and how a run that fails or is stopped ends."""

import sys

import pytest
from typer.testing import CliRunner

from pairquant import cli
from pairquant.cli.app import app
from pairquant.support.errors import ConfigError
from pairquant.support.version import __version__

COMMANDS = [
    "quantize", "presets", "eval", "compare", "chat", "serve", "bench", "inspect", "report", "export", "push", "tune",
]  # fmt: skip


@pytest.fixture
def typed(monkeypatch):
    """Runs the command line in this process with these words; gives the exit status."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["pairquant", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    return run


def test_the_version_is_the_packages(typed, capsys):
    assert typed("--version") == 0
    assert capsys.readouterr().out == f"pairquant {__version__}\n"


def test_the_help_lists_every_command_in_the_order_of_use():
    shown = CliRunner().invoke(app, ["--help"]).output
    first_words = [line.strip("│ ").partition(" ")[0] for line in shown.rpartition("Commands")[2].splitlines()]
    assert [word for word in first_words if word in COMMANDS] == COMMANDS
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_of_its_own(command):
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0, done.output
    assert f"{command} [OPTIONS]" in done.output


def test_an_unknown_command_is_refused(typed, capsys):
    assert typed("quantise") == 2
    assert "No such command 'quantise'" in capsys.readouterr().err


def test_an_error_is_printed_as_it_is_though_it_looks_like_markup(typed, capsys, monkeypatch):
    def fail(*_):
        raise ConfigError("path re:layers[/].up is [bold]not[/bold] allowed")

    monkeypatch.setattr(cli, "app", fail)
    assert typed("quantize") == 1
    assert capsys.readouterr() == ("", "error: path re:layers[/].up is [bold]not[/bold] allowed\n")


def test_a_stopped_run_says_how_it_goes_on(typed, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", stop)
    assert typed("quantize") == 130
    assert "the same command continues" in capsys.readouterr().err


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "argv", ["pairquant"])
    with pytest.raises(ZeroDivisionError):
        cli.main()
