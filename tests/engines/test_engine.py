"""What engines share: options, the tokens of a conversation, and the error for logits that are not finite."""

import pytest
import torch
from tiny_models import FAMILIES, byte_tokenizer

from pairquant.engines.engine import EngineOptions, chat_tokens, context_of, overflow
from pairquant.support.errors import ConfigError, SourceError

QUESTION = [{"role": "user", "content": "hi"}]


def with_template(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_options_check_the_dtype_and_a_cpu_computes_in_bfloat16():
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        EngineOptions(dtype="bfloat")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (EngineOptions().dtype_on(cpu), EngineOptions().dtype_on(gpu)) == ("bfloat16", "auto")
    assert EngineOptions(dtype="float32").dtype_on(cpu) == "float32"


def test_a_conversation_becomes_tokens_by_template_or_as_plain_text():
    turns = [*QUESTION, {"role": "assistant", "content": "ho"}]
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(chat_tokens(tokenizer, turns)) == "hi\nho"
    tokenizer = with_template("{% for m in messages %}[{{ m.content }}]{% endfor %}{{ add_generation_prompt }}")
    assert tokenizer.decode(chat_tokens(tokenizer, turns)) == "[hi][ho]True"


@pytest.mark.parametrize(
    ("template", "line", "cause"),
    [
        ("a\n{% for m in messages %}", "in line 2", "Unexpected end of template"),
        ("a\nb\n{{ messages | nofilter }}", "in line 3", "No filter named 'nofilter'"),
        ("a\n{{ messages[0].absent.content }}", "in line 2", "has no attribute 'absent'"),
        ("{{ messages + 1 }}", "in line 1", "can only concatenate list"),
    ],
)
def test_a_broken_template_is_named_with_its_line_and_the_remedy(template, line, cause):
    with pytest.raises(SourceError) as broken:
        chat_tokens(with_template(template), QUESTION)
    message = str(broken.value)
    assert f"chat template is broken {line}: " in message
    assert cause in message
    assert "Mend it in chat_template.jinja" in message


def test_a_template_may_refuse_a_conversation():
    tokenizer = with_template("{{ raise_exception('begin with a system message') }}")
    with pytest.raises(ConfigError, match="refuses the conversation: begin with a system message"):
        chat_tokens(tokenizer, QUESTION)


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [("float16", "--dtype bfloat16 or --dtype float32"), ("bfloat16", "--dtype float32"), ("float32", "inspect")],
)
def test_logits_that_are_not_finite_name_the_dtype_and_the_remedy(dtype, remedy):
    message = str(overflow(dtype))
    assert f"not finite in {dtype}" in message
    assert remedy in message


def test_the_context_is_that_of_the_text_model():
    assert context_of(FAMILIES["llama"]) == 128
