"""Rows of data sets: which are texts, which are chats, which are refused."""

import pytest

from pairquant.support.conversations import Conversation, document_of
from pairquant.support.errors import TextError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS, "id": 3},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"conversations": TURNS},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, TURNS[1]]},
        {"prompt": "Hi", "completion": "Ho"},
        {"prompt": "Hi", "response": "Ho"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"instruction": "Hi", "output": "Ho", "input": ""},
    ],
)  # fmt: skip
def test_chats_of_all_kinds(row):
    assert document_of(row, "x, line 1") == Conversation(TURNS, "x, line 1")


def test_an_instruction_with_input_and_system():
    row = {"instruction": "Translate.", "input": "Haus", "output": "house", "system": "Be brief."}
    assert document_of(row, "x").turns == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Translate.\n\nHaus"},
        {"role": "assistant", "content": "house"},
    ]


@pytest.mark.parametrize(
    ("row", "text"), [({"text": "a", "messages": TURNS}, "a"), ({"question": "a?", "answer": "b"}, "a?\nb")]
)
def test_texts(row, text):
    assert document_of(row, "x") == text


def test_what_else_a_template_may_want_stays():
    turn = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    (found,) = document_of({"messages": [turn]}, "x").turns
    assert found == {**turn, "content": ""}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, r"x: needs a key 'text'.*it has \['messages'\]"),
        ({"messages": [{"role": "user"}]}, r"x, messages, turn 1: needs texts 'role' and 'content'.*it has \['role'\]"),
        ({"messages": ["Hi"]}, "turn 1.*it has str"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "u"}]}]}, "turn 1"),
        ({"prompt": "Hi", None: ["more"]}, r"\['None', 'prompt'\]"),
        ([], "it has list"),
    ],
)
def test_what_is_no_text_is_named(row, message):
    with pytest.raises(TextError, match=message):
        document_of(row, "x")
