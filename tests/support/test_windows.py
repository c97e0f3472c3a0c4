"""Documents → windows: what they begin with, chats, what is replaced."""

import pytest
import torch
from tiny_models import beginning_tokenizer, byte_tokenizer

from pairquant.support.conversations import Conversation
from pairquant.support.errors import ConfigError, TextError
from pairquant.support.windows import describe, own_prefix, token_windows, window_prefix

BOS = 1
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def test_the_prefix_is_what_the_tokenizer_puts_before_a_text():
    assert own_prefix(byte_tokenizer()) == ()
    assert own_prefix(beginning_tokenizer()) == (BOS,)
    assert own_prefix(beginning_tokenizer("<pad> <s>")) == (0, BOS)  # as GLM-4's [gMASK] <sop>


@pytest.mark.parametrize(
    ("adds", "bos", "expected"),
    [
        (True, "auto", (BOS,)), (True, "always", (BOS,)), (True, "never", ()),
        (False, "auto", ()), (False, "always", (BOS,)), (False, "never", ()),
    ],
)  # fmt: skip
def test_bos_is_chosen(adds, bos, expected):
    assert window_prefix(beginning_tokenizer() if adds else byte_tokenizer(), bos) == expected


def test_always_needs_a_token(tiny_tokenizer):
    assert window_prefix(tiny_tokenizer) == ()
    with pytest.raises(ConfigError, match="no <bos> token. Allowed: auto, never"):
        window_prefix(tiny_tokenizer, "always")


def test_windows_with_bos_have_a_token_less_of_the_same_text(tiny_tokenizer):
    text = " ".join(f"a{n}" for n in range(30))
    assert token_windows(tiny_tokenizer, [text], 10).tolist() == torch.arange(30).view(3, 10).tolist()
    windows = token_windows(tiny_tokenizer, [text], 10, prefix=(999,))
    assert windows.dtype == torch.int64
    assert windows[:, 0].tolist() == [999] * 3
    assert windows[:, 1:].tolist() == torch.arange(27).view(3, 9).tolist()


def test_no_room_for_text_is_refused(tiny_tokenizer):
    with pytest.raises(TextError, match="--seq-len"):
        token_windows(tiny_tokenizer, ["a1 a2"], 2, prefix=(5, 6))


def test_no_more_is_read_than_the_windows_need(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("pairquant.support.windows.BATCH", 1)
    read = []

    def endless():
        while True:
            read.append(len(read))
            yield " ".join(f"a{n}" for n in range(10))

    assert token_windows(tiny_tokenizer, endless(), 5, most=4).tolist() == [[*range(5)], [*range(5, 10)]] * 2
    assert len(read) == 2


def test_batches_change_nothing(tiny_tokenizer, monkeypatch):
    texts = [f"a{n} b{n}" for n in range(40)]
    whole = token_windows(tiny_tokenizer, texts, 7)
    monkeypatch.setattr("pairquant.support.windows.BATCH", 20)
    assert torch.equal(token_windows(tiny_tokenizer, texts, 7), whole)


def test_lone_surrogates_are_replaced_and_it_is_said():
    told = []
    windows = token_windows(byte_tokenizer(), ["a\ud83db", "\udc00"], 1, notice=told.append)
    assert byte_tokenizer().decode(windows.flatten()) == "a\ufffdb\n\n\ufffd\n\n"
    assert len(told) == 1
    assert "surrogates" in told[0]


def chat(where="chats.jsonl, line 1"):
    return Conversation([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], where)


def test_chats_are_written_by_the_template_without_its_own_bos():
    tokenizer = beginning_tokenizer()
    tokenizer.chat_template = TEMPLATE
    windows = token_windows(tokenizer, [chat(), "plain", chat()], 5, window_prefix(tokenizer))
    assert (windows == BOS).sum(1).tolist() == [1] * len(windows)
    text = tokenizer.decode(windows[:, 1:].flatten())
    assert "<user>Hi<assistant>Hoplain\n\n<user>Hi<assistant>Ho".startswith(text)
    assert len(text) > 30


def test_a_template_that_begins_with_bos_for_its_own_reasons_is_kept():
    """SmolLM2's `<bos>` is what every turn begins with, and its tokenizer puts none before a text."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    assert token_windows(tokenizer, [chat()], 1)[0].item() == BOS


def test_a_chat_without_template_is_named_with_the_remedy():
    with pytest.raises(
        TextError, match="chats.jsonl, line 1 is a chat, and the tokenizer has no chat template.*'text'"
    ):
        token_windows(byte_tokenizer(), [chat()], 4)


def test_a_chat_that_the_template_refuses_is_named():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(TextError, match="chats.jsonl, line 1: .*System role not supported"):
        token_windows(tokenizer, [chat()], 4)


def test_how_windows_begin_is_said():
    assert "begins with <s>" in describe(byte_tokenizer(), (BOS,))
    assert "--bos never" in describe(byte_tokenizer(), (BOS,))
