"""The version, and the digest that says whether two runs were made by the same code."""

import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

import pairquant
from pairquant.support.version import __version__, code_digest


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The package's code, where it may be changed."""
    package = shutil.copytree(
        Path(pairquant.__file__).parent, tmp_path / "pairquant", ignore=shutil.ignore_patterns("data", "__pycache__")
    )
    monkeypatch.setattr("pairquant.support.version.__file__", str(package / "support" / "version.py"))
    return package


def test_the_version_is_the_one_that_is_installed():
    assert pairquant.__version__ == __version__ == version("pairquant")


def test_the_digest_follows_the_code_alone(copy):
    before = code_digest()
    assert len(before) == 12
    assert int(before, 16) >= 0
    (copy / "notes.txt").write_text("no code")
    assert code_digest() == before
    file = copy / "core" / "pairs.py"
    code = file.read_text()
    file.write_text(code + "\n")
    assert code_digest() != before
    file.write_text(code)
    assert code_digest() == before


def test_new_files_change_the_digest(copy):
    before = code_digest()
    (copy / "core" / "another.py").write_text("pass\n")
    assert code_digest() != before
