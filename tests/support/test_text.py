"""Sources of text: bundled, local files of every kind, data sets; and what is said of others."""

import json

import pytest

from pairquant.support.errors import TextError
from pairquant.support.text import BUNDLED, BUNDLED_TEST, documents, expand


def test_default_is_the_bundled_text():
    names = expand("default")
    assert len(names) == len(BUNDLED)
    assert all(next(iter(documents(name))) for name in names)
    assert expand("c4") == ("c4",)
    assert sum(1 for _ in documents(BUNDLED_TEST)) == 1319


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\n\ntwo", "one\n\ntwo"),
        ("a.md", "# title", "# title"),
        ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n', "onetwo"),
        ("a.json", json.dumps([{"text": "one"}, {"text": "two"}]), "onetwo"),
        ("a.csv", "text,other\none,1\ntwo,2\n", "onetwo"),
        ("a.JSONL", '{"text": "one"}', "one"),
    ],
)
def test_files_are_read_by_what_their_names_say(name, content, expected, tmp_path):
    (tmp_path / name).write_text(content)
    found = list(documents(str(tmp_path / name)))
    assert "".join(text for text in found if isinstance(text, str)) == expected


def test_parquet_and_chats(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    assert list(documents(str(tmp_path / "a.parquet"))) == ["one", "two"]
    chat = {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat))
    (found,) = documents(str(tmp_path / "chats.jsonl"))
    assert not isinstance(found, str)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.bin", "does not tell what format it has. Allowed: .txt"),
        ("lost.txt", "does not exist; did you mean '.*list.txt'|does not exist"),
    ],
)
def test_other_files_are_refused(name, message, tmp_path):
    (tmp_path / "a.bin").write_text("text")
    (tmp_path / "list.txt").write_text("text")
    with pytest.raises(TextError, match=message):
        list(documents(str(tmp_path / name)))


def test_an_unknown_bundled_text_is_refused_with_a_hint():
    with pytest.raises(TextError, match="did you mean 'default/grimm.txt'"):
        list(documents("default/grim.txt"))
