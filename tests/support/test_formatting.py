"""How recorded facts are written."""

import pytest

from pairquant.support.formatting import source_names, token_count


@pytest.mark.parametrize(("shape", "text"), [([128, 2048], "128 × 2048 tokens"), (None, ""), ([1], ""), ("ab", "")])
def test_token_counts(shape, text):
    assert token_count(shape) == text


def test_sources_are_named_without_the_directories_of_this_machine():
    assert source_names(["/home/me/chats.jsonl", "default/grimm.txt", "wikitext2"]) == (
        "chats.jsonl, default/grimm.txt, wikitext2"
    )
    assert source_names("c4") == "c4"
