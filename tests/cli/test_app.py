"""Help: each command on one screen of 80 columns, in groups, beginning with a verb, with an example that parses."""

import re
import shlex

import pytest
import typer
from typer.testing import CliRunner

from pairquant.cli import app

COMMANDS = typer.main.get_command(app).commands
#: Lines of a terminal window.
SCREEN = 42
#: What descriptions may begin with.
VERBS = {"Chat", "Compare", "Measure", "Quantize", "Serve", "Show", "Upload", "Write"}


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
