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


def test_a_model_lies_where_its_commit_or_else_its_branch_does(cache, monkeypatch):
    assert in_cache("org/model") == in_cache("org/model", "main") == cache / NEW
    assert in_cache("org/model", OLD) == cache / OLD
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/no/such/directory")
    assert in_cache("org/model", cache=str(cache.parents[1])) == cache / NEW


@pytest.mark.parametrize(
    ("name", "revision"), [("org/other", None), ("org/model", "c" * 40), ("", None), ("/no/such/directory", None)]
)
def test_what_is_not_there_is_an_error(cache, name, revision):
    with pytest.raises(SourceError, match=f"model {name!r} is not in the hub's cache"):
        in_cache(name, revision)
