"""Places of results are checked before the work; commands can be typed as they are shown."""

import os

import pytest
import typer

from pairquant.cli import with_home
from pairquant.cli.display import TimeLeft, command_line, in_lines, require_place


def test_a_directory_or_a_missing_one_is_refused_before_the_work(tmp_path):
    require_place(None)
    require_place(tmp_path / "results.json")
    with pytest.raises(typer.BadParameter, match="is a directory"):
        require_place(tmp_path)
    with pytest.raises(typer.BadParameter, match="no such directory"):
        require_place(tmp_path / "nowhere" / "results.json")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(typer.BadParameter, match="cannot be written"):
        require_place(tmp_path / "results.json")


def test_paths_with_spaces_are_quoted():
    assert command_line("pairquant", "eval", "my model") == "pairquant eval 'my model'"


def test_a_home_directory_that_the_shell_left_is_replaced():
    home = os.path.expanduser("~")
    given = ["quantize", "~/model", "--output=~/out", "--set=a=~b", "-x=~/y", "--seed=3"]
    assert with_home(given) == ["quantize", "~/model", f"--output={home}/out", "--set=a=~b", "-x=~/y", "--seed=3"]


def test_the_time_left_counts_down_while_a_step_goes_on():
    left = TimeLeft()
    assert left.seconds_left(0, 2, 10, 5.0) is None  # two steps were done by an earlier run
    assert left.seconds_left(0, 3, 10, 65.0) == pytest.approx(7 * 60)
    assert left.seconds_left(0, 3, 10, 95.0) == pytest.approx(7 * 60 - 30)
    assert left.seconds_left(0, 4, 10, 145.0) == pytest.approx(6 * 70)
    assert left.seconds_left(0, 4, 10, 10_000.0) == 0
    assert left.seconds_left(0, 0, 10, 10_001.0) is None  # begun anew
    assert left.seconds_left(1, 0, None, 0.0) is None


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("short", ["short"]),
        ("runs/SmolLM2-135M-Instruct-PARO", ["runs/SmolLM2-", "135M-Instruct-", "PARO"]),
        ("a-name_of.many/parts", ["a-name_of.many/", "parts"]),
        ("averyveryverylongword", ["averyveryverylongword"]),
    ],
)
def test_names_are_broken_between_their_parts(name, lines):
    assert in_lines(name, 16).split("\n") == lines
    assert in_lines(name, 16).replace("\n", "") == name
