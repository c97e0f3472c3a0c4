"""What the hub's cache on this machine holds of a model."""

import pytest

from pairquant.checkpoint.downloads import in_cache
from pairquant.support.errors import SourceError

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with two commits of one model, whose branch is at the newer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--org--model"
    for commit in (OLD, NEW):
        (home / "snapshots" / commit).mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(NEW)
    return home / "snapshots"


def test_a_model_lies_where_its_commit_or_else_its_branch_does(cache):
    assert in_cache("org/model") == cache / NEW
    assert in_cache("org/model", OLD) == cache / OLD


@pytest.mark.parametrize(
    ("name", "commit"), [("org/other", None), ("org/model", "c" * 40), ("", None), ("/no/such/directory", None)]
)
def test_what_is_not_there_is_an_error(cache, name, commit):
    with pytest.raises(SourceError, match=f"model {name!r} is not in the hub's cache"):
        in_cache(name, commit)
