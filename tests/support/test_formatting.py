"""How numbers and names are written."""

from pathlib import Path

import pytest

from pairquant.support import formatting


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        ("size", 0, "0.0 MB"),
        ("size", 1_234_567, "1.2 MB"),
        ("size", 999_000_000, "999.0 MB"),
        ("size", 5_678_000_000, "5.68 GB"),
        ("duration", 0.04, "0.0 s"),
        ("duration", 59.2, "59.2 s"),
        ("duration", 60, "1 min 0 s"),
        ("duration", 59.7, "1 min 0 s"),
        ("duration", 3725, "62 min 5 s"),
        ("scientific", 0.000123, "1.2e-04"),
        ("scientific", None, ""),
        ("percent", 0.01234567, "1.235"),
        ("percent", None, "–"),
        ("plain", ["a", 1], "a, 1"),
        ("plain", (), ""),
        ("plain", 4, "4"),
        ("plain", "text", "text"),
        ("departure", 1234.0, "1,234"),
        ("departure", None, "–"),
        ("departs", 7.0, "at token 7 (median)"),
        ("departs", None, "never in half of them or more"),
    ],
)
def test_values_are_written(write, value, text):
    assert getattr(formatting, write)(value) == text


def test_numbers_have_the_digits_asked_for():
    assert formatting.number(1.23456, 2) == "1.23"
    assert formatting.number(0.0, 3) == "0.000"
    assert formatting.number(None, 3) == ""


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/one", "/b/two"], ["one", "two"]),
        (["/a/model", "/b/model"], ["a/model", "b/model"]),
        (["/x/a/model", "/y/a/model", "/y/b/other"], ["x/a/model", "y/a/model", "y/b/other"]),
        (["model", "/b/model"], ["model", "b/model"]),
        (["/a/one"], ["one"]),
        ([], []),
        (["/a/same", "/a/same"], ["/a/same", "/a/same"]),
    ],
)
def test_paths_are_shortened_as_far_as_they_differ(paths, names):
    assert formatting.distinct_ends([Path(path) for path in paths]) == names


@pytest.mark.parametrize(
    ("path", "short", "block"),
    [
        ("model.layers.3.mlp.up_proj", "up", ("3", "mlp.up_proj")),
        ("transformer.h.11.attn.c_attn", "c_attn", ("11", "attn.c_attn")),
        ("model.layers.3.mlp.experts.5.up_proj", "up", ("3", "mlp.experts.5.up_proj")),
        ("lm_head", "lm_head", ("", "lm_head")),
    ],
)
def test_paths_of_linears_are_taken_apart(path, short, block):
    assert formatting.short_name(path) == short
    assert formatting.block_and_rest(path) == block


@pytest.mark.parametrize(("shape", "text"), [([128, 2048], "128 × 2048 tokens"), (None, ""), ([1], ""), ("ab", "")])
def test_token_counts(shape, text):
    assert formatting.token_count(shape) == text


def test_sources_are_named_without_the_directories_of_this_machine():
    assert formatting.source_names(["/home/me/chats.jsonl", "default/grimm.txt", "wikitext2"]) == (
        "chats.jsonl, default/grimm.txt, wikitext2"
    )
    assert formatting.source_names("c4") == "c4"
