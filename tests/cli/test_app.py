"""Help: each command on one screen of 80 columns, in groups, beginning with a verb, with an example that parses.

And how a command line ends that fails or is stopped.
"""

import re
import shlex
import sys

import pytest
import typer
from typer.testing import CliRunner

from pairquant import cli
from pairquant.cli import app
from pairquant.support.errors import ConfigError
from pairquant.support.version import __version__

COMMANDS = typer.main.get_command(app).commands
#: Lines of a terminal window.
SCREEN = 42
#: What descriptions may begin with.
VERBS = {"Chat", "Choose", "Compare", "Measure", "Quantize", "Serve", "Show", "Upload", "Write"}


def help_of(*words):
    done = CliRunner().invoke(app, [*words], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen_and_begins_with_a_verb(name):
    shown = help_of(name, "--help")
    assert len(shown.rstrip().splitlines()) <= SCREEN
    assert max(map(len, shown.splitlines())) <= 80
    assert COMMANDS[name].help.split()[0] in VERBS


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_parses(name):
    example = COMMANDS[name].epilog.removeprefix("Example: ")
    program, command, *arguments = shlex.split(example)
    assert (program, command) == ("pairquant", name)
    COMMANDS[name].make_context(name, arguments)


def test_the_overview_names_every_command_and_an_example():
    shown = help_of("--help")
    assert all(re.search(rf"│ {name} ", shown) for name in COMMANDS)
    assert "Example: pairquant quantize" in shown


@pytest.mark.parametrize("name", [name for name, each in COMMANDS.items() if any(p.hidden for p in each.params)])
def test_help_all_shows_what_help_leaves_out(name):
    hidden = [parameter.opts[0] for parameter in COMMANDS[name].params if parameter.hidden]
    short = help_of(name, "--help")
    assert "--help-all" in short
    assert not any(f"{option} " in short for option in hidden)
    assert all(f"{option} " in help_of(name, "--help-all") for option in hidden)
    for parameter in COMMANDS[name].params:
        parameter.hidden = parameter.opts[0] in hidden


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
