"""Files of rows and of text: parsed or refused, whole or in pieces."""

import json
import random

import pytest

from pairquant.support import rows
from pairquant.support.errors import TextError
from pairquant.support.rows import Pieces, plain_text, rows_of

ROWS = [{"text": f"row {n}", "more": 'a, "b"\nc'} for n in range(5)]


def values(path, pieces=None):
    return [row for _, row in rows_of(path, pieces)]


@pytest.mark.parametrize("name", ["t.json", "t.JSON", "t.jsonl", "t.JSONL"])
def test_a_row_a_line(name, tmp_path):
    (tmp_path / name).write_text("\n".join(map(json.dumps, ROWS)) + "\n\n", encoding="utf-8-sig")
    assert values(tmp_path / name) == ROWS
    assert [where for where, _ in rows_of(tmp_path / name)][1] == f"{tmp_path / name}, line 2"


def test_json_lists_and_single_rows(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(ROWS, indent=1))
    assert values(path) == ROWS
    path.write_text(json.dumps(ROWS[0], indent=1))
    assert values(path) == ROWS[:1]


def test_csv_has_its_names_in_the_first_line(tmp_path):
    path = tmp_path / "t.CSV"
    path.write_text('text,more\nrow 0,"a, ""b""\nc"\n' + f"{'long ' * 40_000},x\n", encoding="utf-8-sig")
    first, second = values(path)
    assert first == ROWS[0]
    assert len(second["text"]) == 200_000  # above the standard library's limit


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b'{"text": "a"}\n{"text"\n', "t.jsonl, line 2: not JSON"),
        ("t.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', "not UTF-8 text .* at byte 13 of line 2"),
        ("t.json", b'{"text": "a"}\n{"text"\n', "t.json, line 2: not JSON"),
        ("t.json", b'[{"text": "a"},\n', "t.json, line 2: not JSON"),
        ("t.json", b'["caf\xe9"]', "not UTF-8"),
        ("t.json", b"[" * 200_000, "not JSON"),
        ("t.csv", b"text\ncaf\xe9\n", "not UTF-8"),
        ("t.csv", b'text\n"never ends\n', "not CSV"),
    ],
)
def test_damaged_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message):
        values(tmp_path / name)


@pytest.fixture
def small(monkeypatch):
    """What counts as large here."""
    monkeypatch.setattr(rows, "LARGE", 1000)
    monkeypatch.setattr(rows, "DOCUMENT", 300)


def write_numbers(path, count=2000):
    content = {
        ".txt": "".join(f"{n} grüße\n" for n in range(count)),
        ".jsonl": "".join(json.dumps({"text": str(n)}) + "\n" for n in range(count)),
        ".json": json.dumps([{"text": str(n)} for n in range(count)]),
        ".csv": "text\n" + "".join(f"{n}\n" for n in range(count)),
    }
    path.write_text(content[path.suffix], encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_pieces_of_rows_are_spread_over_the_file(suffix, tmp_path, small):
    path, pieces = write_numbers(tmp_path / f"t{suffix}"), Pieces(8, 100, seed=1)
    numbers = [int(row["text"]) for row in values(path, pieces)]
    assert numbers == sorted(set(numbers))  # in order, none twice
    assert 20 < len(numbers) < 400
    assert {n // 500 for n in numbers} == {0, 1, 2, 3}
    assert numbers == [int(row["text"]) for row in values(path, pieces)]
    assert numbers != [int(row["text"]) for row in values(path, Pieces(8, 100, seed=2))]


def test_pieces_of_a_plain_text_are_whole_lines(tmp_path, small):
    path = write_numbers(tmp_path / "t.txt")
    found = list(plain_text(path, Pieces(8, 100, seed=1)))
    assert len(found) == 8
    lines = "".join(found).splitlines()
    assert all(line.endswith(" grüße") and line.split()[0].isdecimal() for line in lines)
    assert {int(line.split()[0]) // 500 for line in lines} == {0, 1, 2, 3}


def test_pieces_of_one_long_line_are_whole_characters(tmp_path, small):
    path = tmp_path / "t.txt"
    path.write_text("".join(random.Random(0).choices("aé€😀", k=3000)), encoding="utf-8")
    found = list(plain_text(path, Pieces(4, 100, seed=0)))
    assert len(found) == 4
    assert set("".join(found)) == set("aé€😀")


def test_pieces_that_are_not_utf_8_are_refused(tmp_path, small):
    path = tmp_path / "t.txt"
    path.write_bytes("café au lait\n".encode("latin-1") * 300)
    with pytest.raises(TextError, match="not UTF-8 text .*at byte [0-9]+"):
        list(plain_text(path, Pieces(4, 100, seed=0)))


def test_rows_longer_than_a_stretch_come_once(tmp_path, small):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": str(n) * 900}) + "\n" for n in range(5)))
    found = [row["text"][0] for row in values(path, Pieces(16, 50, seed=0))]
    assert found == sorted(set(found))


def test_a_large_text_is_all_there_in_documents(tmp_path, small):
    path = write_numbers(tmp_path / "t.txt")
    found = list(plain_text(path))
    assert "".join(found) == path.read_text(encoding="utf-8")
    assert len(found) > 10
    path.write_text("€" * 2000, encoding="utf-8")  # no line ends
    assert "".join(plain_text(path)) == "€" * 2000
    path.write_bytes(b"fine\n" * 300 + b"caf\xe9 x\n")
    with pytest.raises(TextError, match="not UTF-8 text .*at byte 1503"):
        list(plain_text(path))


def test_a_small_file_is_read_whole_whatever_is_asked(tmp_path):
    path = write_numbers(tmp_path / "t.jsonl")
    assert len(values(path, Pieces(2, 10, seed=0))) == 2000
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    assert list(plain_text(path, Pieces(1, 4, seed=0))) == ["one\ntwo\nthree"]
