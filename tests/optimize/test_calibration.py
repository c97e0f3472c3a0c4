"""Calibration text: sources, shares, faults."""

import json

import pytest
import torch
from tiny_models import beginning_tokenizer, tiny_model

from pairquant.optimize.calibration import calibrate, calibrator
from pairquant.spec.options import QuantConfig
from pairquant.support.errors import ConfigError, SourceError, TextError
from pairquant.support.text import SHORT_NAMES, documents

SEQ_LEN = 10


def words(letter: str, count: int, start: int = 0) -> str:
    """ "a0 a1 a2 …": each word one token (see `tiny_tokenizer`)."""
    return " ".join(f"{letter}{n}" for n in range(start, start + count))


def write_txt(path, letter, count):
    path.write_text(words(letter, count), encoding="utf-8")


def write_jsonl(path, letter, count):
    rows = [{"text": words(letter, 5, start)} for start in range(0, count, 5)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")


def write_questions(path, letter, count):
    rows = [
        {"question": words(letter, 2, start), "answer": words(letter, 3, start + 2), "id": start}
        for start in range(0, count, 5)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def write_json(path, letter, count):
    path.write_text(json.dumps([{"text": words(letter, 5, start)} for start in range(0, count, 5)]), encoding="utf-8")


def write_csv(path, letter, count):
    rows = [f'{start},"{words(letter, 5, start)}"' for start in range(0, count, 5)]
    path.write_text("\n".join(["id,text", *rows]), encoding="utf-8")


def write_parquet(path, letter, count):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [words(letter, 5, start) for start in range(0, count, 5)]}), path)


@pytest.fixture(autouse=True)
def data_sets_cache(tmp_path_factory, monkeypatch):
    """`datasets` must not write to the home directory."""
    config = pytest.importorskip("datasets.config")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture
def sources(tmp_path):
    """Write text files of so many tokens and give their names: sources(a=200, b=50)."""

    def write(**counts):
        for letter, count in counts.items():
            write_txt(tmp_path / f"{letter}.txt", letter, count)
        return [str(tmp_path / f"{letter}.txt") for letter in counts]

    return write


def shares_of(tokens) -> dict[str, int]:
    """Windows drawn from each letter's source."""
    letters = ["abc"[place] for place in (tokens[:, 0] // 1000).tolist()]
    return {letter: letters.count(letter) for letter in sorted(set(letters))}


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        ("txt", write_txt),
        ("md", write_txt),
        ("jsonl", write_jsonl),
        ("JSONL", write_jsonl),
        ("jsonl", write_questions),
        ("json", write_json),
        ("csv", write_csv),
        ("parquet", write_parquet),
    ],
)
def test_a_file_is_cut_into_whole_windows(suffix, write, tmp_path, tiny_tokenizer):
    path = tmp_path / f"text.{suffix}"
    write(path, "a", 105)
    drawn = calibrate(tiny_tokenizer, [str(path)], samples=10, seq_len=SEQ_LEN, seed=0)
    assert drawn.tokens.dtype == torch.int64
    assert torch.equal(drawn.tokens.sort(0).values, torch.arange(100).view(10, SEQ_LEN))
    assert drawn.sources == (str(path),)


def test_a_directory_of_json_lines_is_a_data_set(tmp_path, tiny_tokenizer):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", "b", 100)
    drawn = calibrate(tiny_tokenizer, [str(folder)], samples=10, seq_len=SEQ_LEN, seed=0)
    assert torch.equal(drawn.tokens.sort(0).values, 1000 + torch.arange(100).view(10, SEQ_LEN))


def test_a_data_set_is_named_with_configuration_and_split(tmp_path, tiny_tokenizer):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", "a", 100)
    write_jsonl(folder / "validation.jsonl", "b", 100)
    drawn = calibrate(tiny_tokenizer, [f"{folder}:default:validation"], samples=4, seq_len=SEQ_LEN, seed=0)
    assert shares_of(drawn.tokens) == {"b": 4}


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_short_names_reach_their_data_sets(name, tmp_path, tiny_tokenizer, monkeypatch):
    """Against a local copy of each, as `datasets` lays one out."""
    repository, config, split = SHORT_NAMES[name].split(":")
    copy = tmp_path / repository
    copy.mkdir(parents=True)
    (copy / f"{split}.jsonl").write_text("".join(json.dumps({"text": f"a{n} a{n}"}) + "\n" for n in range(8)))
    if config:
        files = f"configs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {split}.jsonl\n"
        (copy / "README.md").write_text(f"---\n{files}---\n")
    monkeypatch.chdir(tmp_path)
    found = calibrate(tiny_tokenizer, [name], samples=4, seq_len=4, seed=0)
    assert sorted(found.tokens.flatten().tolist()) == sorted([*range(8)] * 2)  # packed, none dropped


def test_the_default_source_is_the_bundled_texts(tiny_tokenizer):
    drawn = calibrate(tiny_tokenizer, ["default"], samples=2, seq_len=16, seed=0)
    assert drawn.tokens.shape == (2, 16)
    assert len(drawn.sources) == 2
    assert all(name.startswith("default/") for name in drawn.sources)


def test_empty_documents_and_lines_are_skipped(tmp_path, tiny_tokenizer):
    path = tmp_path / "text.jsonl"
    rows = [json.dumps({"text": text}) for text in ("", "  \n", words("a", 10))]
    path.write_text("\n\n".join(rows), encoding="utf-8")
    drawn = calibrate(tiny_tokenizer, [str(path)], samples=1, seq_len=SEQ_LEN, seed=0)
    assert drawn.tokens.tolist() == [list(range(10))]


@pytest.mark.parametrize(
    ("counts", "samples", "expected"),
    [
        ({"a": 500, "b": 500}, 20, {"a": 10, "b": 10}),
        ({"a": 500, "b": 500, "c": 500}, 9, {"a": 3, "b": 3, "c": 3}),
        ({"a": 500, "b": 30}, 20, {"a": 17, "b": 3}),
        ({"a": 20, "b": 500, "c": 90}, 30, {"a": 2, "b": 19, "c": 9}),
        ({"a": 50, "b": 30}, 8, {"a": 5, "b": 3}),
        ({"a": 9, "b": 100}, 4, {"b": 4}),
    ],
)
def test_shares_are_even_and_short_sources_are_topped_up(counts, samples, expected, sources, tiny_tokenizer):
    drawn = calibrate(tiny_tokenizer, sources(**counts), samples, SEQ_LEN, seed=0)
    assert shares_of(drawn.tokens) == expected


@pytest.mark.parametrize("samples", [1, 2, 4, 5])
def test_uneven_shares_differ_by_one(samples, sources, tiny_tokenizer):
    drawn = calibrate(tiny_tokenizer, sources(a=500, b=500, c=500), samples, SEQ_LEN, seed=0)
    shares = shares_of(drawn.tokens)
    assert sum(shares.values()) == samples
    assert all(share in (samples // 3, samples // 3 + 1) for share in shares.values())


def test_no_window_is_drawn_twice(sources, tiny_tokenizer):
    drawn = calibrate(tiny_tokenizer, sources(a=300, b=300), 50, SEQ_LEN, seed=3)
    assert len(drawn.tokens.unique(dim=0)) == 50


def test_further_windows_leave_the_first_as_they_are(sources, tiny_tokenizer):
    names = sources(a=500, b=80)  # 50 and 8 windows
    first = calibrate(tiny_tokenizer, names, 12, SEQ_LEN, seed=3)
    drawn = calibrate(tiny_tokenizer, names, 12, SEQ_LEN, seed=3, more=20)
    assert torch.equal(drawn.tokens[:12], first.tokens)
    assert shares_of(drawn.tokens[:12]) == {"a": 6, "b": 6}
    assert shares_of(drawn.tokens[12:]) == {"a": 18, "b": 2}, "what is left"
    assert len(drawn.tokens.unique(dim=0)) == 32
    assert len(calibrate(tiny_tokenizer, names, 12, SEQ_LEN, seed=3, more=1000).tokens) == 58


def test_text_that_is_sampled_takes_the_share_that_the_others_leave(sources, tiny_tokenizer):
    asked = []

    def sampled(count):
        asked.append(count)
        return torch.full((count, SEQ_LEN), 2000) + torch.arange(count)[:, None]

    drawn = calibrate(tiny_tokenizer, ["self", *sources(a=40)], 12, SEQ_LEN, seed=3, more=10, sampled=sampled)
    assert asked == [18]
    assert shares_of(drawn.tokens[:12]) == {"c": 8, "a": 4}
    assert shares_of(drawn.tokens[12:]) == {"c": 10}
    with pytest.raises(TextError, match="can be calibrated on only"):
        calibrate(tiny_tokenizer, ["self"], 4, SEQ_LEN, seed=3)


def test_sources_are_mixed(sources, tiny_tokenizer):
    drawn = calibrate(tiny_tokenizer, sources(a=500, b=500), 40, SEQ_LEN, seed=0)
    assert shares_of(drawn.tokens[:20]).keys() == {"a", "b"}


def test_the_same_seed_draws_the_same_tokens(sources, tiny_tokenizer):
    names = sources(a=500, b=500)
    one, other = (calibrate(tiny_tokenizer, names, 20, SEQ_LEN, seed=5) for _ in range(2))
    assert torch.equal(one.tokens, other.tokens)
    assert one.digest == other.digest
    assert len(one.digest) == 64


def test_another_seed_draws_other_tokens_and_another_digest(sources, tiny_tokenizer):
    names = sources(a=500, b=500)
    draws = [calibrate(tiny_tokenizer, names, 20, SEQ_LEN, seed) for seed in range(4)]
    assert len({drawn.digest for drawn in draws}) == 4
    assert not torch.equal(draws[0].tokens, draws[1].tokens)


def test_other_text_gives_another_digest(tmp_path, tiny_tokenizer):
    digests = set()
    for letter in "ab":
        write_txt(tmp_path / "text.txt", letter, 100)
        digests.add(calibrate(tiny_tokenizer, [str(tmp_path / "text.txt")], 10, SEQ_LEN, seed=0).digest)
    assert len(digests) == 2


@pytest.mark.parametrize("counts", [{"a": 25, "b": 9}, {"a": 5}, {"a": 0, "b": 0}])
def test_too_little_text_says_how_much_there_is(counts, sources, tiny_tokenizer):
    names = sources(**counts)
    there = sum(count // SEQ_LEN for count in counts.values())
    message = _refused(tiny_tokenizer, names)
    assert f"3 windows of {SEQ_LEN} tokens wanted, {there} there" in message
    assert all(f"{name}: {count // SEQ_LEN}" in message for name, count in zip(names, counts.values(), strict=True))
    assert "--samples" in message
    assert "--seq-len" in message


def test_no_source_at_all_is_too_little_text(tiny_tokenizer):
    assert "too short" in _refused(tiny_tokenizer, [])


def test_a_missing_file_is_named_with_its_neighbour(sources, tmp_path, tiny_tokenizer):
    sources(a=100)
    (tmp_path / "novels.jsonl").write_text("")
    wanted = str(tmp_path / "novel.jsonl")
    message = _refused(tiny_tokenizer, [wanted])
    assert wanted in message
    assert f"did you mean '{tmp_path / 'novels.jsonl'}'?" in message


def test_a_missing_file_in_a_missing_directory_is_named(tmp_path, tiny_tokenizer):
    wanted = str(tmp_path / "nowhere" / "text.txt")
    assert wanted in _refused(tiny_tokenizer, [wanted])


@pytest.mark.parametrize(
    ("name", "hint"), [("defualt", "did you mean 'default'?"), ("no-such-owner/no-such-set", "name[:config[:split]]")]
)
def test_an_unknown_name_is_refused_with_what_is_allowed(name, hint, tiny_tokenizer):
    message = _refused(tiny_tokenizer, [name])
    assert repr(name) in message
    assert hint in message
    assert all(allowed in message for allowed in ("default", ".txt", ".jsonl", ".parquet"))


def test_an_unknown_bundled_text_is_refused(tiny_tokenizer):
    assert "default/grim.txt" in _refused(tiny_tokenizer, ["default/grim.txt"])


def test_an_unknown_split_is_refused(tmp_path, tiny_tokenizer):
    write_jsonl(tmp_path / "train.jsonl", "a", 100)
    assert "validation" in _refused(tiny_tokenizer, [f"{tmp_path}:default:validation"])


def test_a_bad_json_line_is_named_by_its_number(tmp_path, tiny_tokenizer):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a1"}\n\n{"text": "a2"\n', encoding="utf-8")
    message = _refused(tiny_tokenizer, [str(path)])
    assert f"{path}, line 3" in message
    assert "not JSON" in message


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"body": "a1", "id": 3}, "['body', 'id']"),
        ({"text": 3}, "['text']"),
        ({"question": "a1"}, "['question']"),
        (["a1"], "list"),
        ("a1", "str"),
        (None, "NoneType"),
    ],
)
def test_a_row_without_text_is_named_with_its_keys(row, found, tmp_path, tiny_tokenizer):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a1"}\n' + json.dumps(row), encoding="utf-8")
    message = _refused(tiny_tokenizer, [str(path)])
    assert f"{path}, line 2" in message
    assert "'text'" in message
    assert "'question'" in message
    assert found in message


def test_parquet_without_text_is_named_with_its_columns(tmp_path, tiny_tokenizer):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["a1"]}), tmp_path / "text.parquet")
    message = _refused(tiny_tokenizer, [str(tmp_path / "text.parquet")])
    assert str(tmp_path / "text.parquet") in message
    assert "body" in message


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv", "parquet"])
def test_a_file_that_is_not_what_its_name_says_is_named(suffix, tmp_path, tiny_tokenizer):
    path = tmp_path / f"text.{suffix}"
    path.write_bytes(b'{"text": "caf\xe9 a1 a2"}\n')  # Latin-1
    message = _refused(tiny_tokenizer, [str(path)])
    assert str(path) in message
    if suffix != "parquet":
        assert "not UTF-8" in message


@pytest.mark.parametrize("name", ["text.bin", "text.jsonl.gz", "text"])
def test_a_file_of_an_unknown_kind_is_refused(name, tmp_path, tiny_tokenizer):
    (tmp_path / name).write_text(words("a", 100))
    message = _refused(tiny_tokenizer, [str(tmp_path / name)])
    assert str(tmp_path / name) in message
    assert all(allowed in message for allowed in (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet"))


def test_a_damaged_file_in_a_data_set_is_refused(tmp_path, tiny_tokenizer):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a1"\n{"tex', encoding="utf-8")
    assert str(folder) in _refused(tiny_tokenizer, [str(folder)])


def _refused(tokenizer, names) -> str:
    with pytest.raises(TextError) as caught:
        calibrate(tokenizer, names, samples=3, seq_len=SEQ_LEN, seed=0)
    return str(caught.value)


def test_a_data_set_that_is_a_script_is_read_from_the_hubs_export(monkeypatch):
    asked = []

    def load(*arguments, revision=None, data_dir=None, **options):
        asked.append((arguments, revision, data_dir))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found own.py")
        return [{"text": "What it says."}]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert list(documents("who/own:en:test")) == ["What it says."]
    assert asked == [(("who/own", "en"), None, None), (("who/own",), "refs/convert/parquet", "en")]


def test_windows_begin_with_bos_where_asked(sources, tiny_tokenizer):
    names = sources(a=500)
    plain = calibrate(tiny_tokenizer, names, 5, SEQ_LEN, seed=0)
    begun = calibrate(tiny_tokenizer, names, 5, SEQ_LEN, seed=0, prefix=(2999,))
    assert (begun.tokens[:, 0] == 2999).all()
    assert not (begun.tokens[:, 1:] == 2999).any()
    assert begun.tokens.shape == plain.tokens.shape
    assert begun.bos
    assert begun.first(2).bos
    assert not plain.bos


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv"])
def test_of_a_large_text_pieces_spread_over_it_are_read(suffix, tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("pairquant.support.rows.LARGE", 10_000)
    monkeypatch.setattr("pairquant.optimize.calibration.PIECE", 200)
    path, told = tmp_path / f"text.{suffix}", []
    text = [words("a", 10, 10 * (n // 20)) for n in range(2000)]  # the words tell the place in the file
    content = {
        "txt": "\n".join(text),
        "jsonl": "\n".join(json.dumps({"text": line}) for line in text),
        "json": json.dumps([{"text": line} for line in text]),
        "csv": "text\n" + "\n".join(text),
    }
    path.write_text(content[suffix])
    drawn = calibrate(tiny_tokenizer, [str(path)], 40, SEQ_LEN, seed=0, notice=told.append)
    assert len(told) == 1
    assert str(path) in told[0]
    assert "pieces" in told[0]
    places = drawn.tokens.float().mean(1)
    assert places.min() < 200
    assert places.max() > 800
    assert drawn.digest == calibrate(tiny_tokenizer, [str(path)], 40, SEQ_LEN, seed=0).digest
    assert drawn.digest != calibrate(tiny_tokenizer, [str(path)], 40, SEQ_LEN, seed=1).digest


def test_pieces_that_hold_too_little_give_way_to_the_whole(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("pairquant.support.rows.LARGE", 1000)
    monkeypatch.setattr("pairquant.optimize.calibration.PIECE", 10)
    path, told = tmp_path / "text.txt", []
    path.write_text("\n".join(f"a{n}" + " " * 200 for n in range(100)))
    drawn = calibrate(tiny_tokenizer, [str(path)], 10, SEQ_LEN, seed=0, notice=told.append)
    assert torch.equal(drawn.tokens.sort(0).values, torch.arange(100).view(10, SEQ_LEN))
    assert told == []


def drawer(tokenizer, model=None, told=None, **options):
    notice = (told if told is not None else []).append
    return calibrator(model or tiny_model(), "the/model", tokenizer, QuantConfig(seed=0, **options), notice)


def test_a_run_says_that_its_windows_begin_with_bos(sources):
    told = []
    drawn = drawer(beginning_tokenizer(), told=told, seq_len=16)(sources(a=500), 4)
    assert drawn.bos
    assert "begins with <s>" in told[0]
    never = drawer(beginning_tokenizer(), bos="never", seq_len=16)(sources(a=500), 4)
    assert not never.bos


def test_a_length_beyond_what_the_model_was_made_for_is_said(sources):
    told = []
    drawer(beginning_tokenizer(), told=told, bos="never", seq_len=129)
    assert "longer than the 128" in told[0]


def test_learned_positions_are_checked_before_any_text_is_read():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=288, n_positions=64, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match="seq_len is 65, allowed: up to 64"):
        drawer(beginning_tokenizer(), model, seq_len=65)


def test_tokens_without_an_embedding_are_refused(sources, tiny_tokenizer):
    with pytest.raises(
        SourceError, match="gives token id [0-9]+, but 'the/model' only has embeddings for ids 0 to 287"
    ):
        drawer(tiny_tokenizer, seq_len=16)(sources(a=500), 8)
