"""Requests are checked by tables: what the server does not obey is refused, what changes nothing is dropped."""

import pytest

from pairquant.engines.requests import (
    CHAT,
    COMPLETIONS,
    RESPONSES,
    UNLIMITED,
    RequestError,
    check,
    error_body,
    room_for_answer,
)

HELLO = [{"role": "user", "content": "hello"}]


def checked_chat(**fields):
    body = {"messages": HELLO} | fields
    check(body, CHAT, "messages")
    return body


def test_fields_that_change_nothing_are_dropped_and_the_newer_name_is_understood():
    body = checked_chat(user="me", stream_options={"include_usage": True}, n=1, top_p=None, max_completion_tokens=7)
    assert body == {"messages": HELLO, "n": 1, "max_tokens": 7}


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "top_p": 1, "seed": -3, "stream": True, "stop": ["a", "b"], "logit_bias": {"5": -100}},
        {"logprobs": False, "presence_penalty": 0.0, "response_format": {"type": "text"}, "tool_choice": "auto"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        {
            "messages": [
                {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "content": "7", "tool_call_id": "1"},
            ]
        },
    ],
)
def test_what_the_server_obeys_passes(fields):
    assert checked_chat(**fields) == {"messages": HELLO} | fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"n": 2},
            "n is 2, allowed: 1 on the engine Transformers. Leave it out, or serve the model with --engine vllm",
        ),
        ({"logprobs": True}, "logprobs is True, allowed: false"),
        ({"top_logprobs": 5}, "allowed: 0"),
        ({"frequency_penalty": 0.5}, "allowed: 0"),
        ({"response_format": {"type": "json_object"}}, '"type": "text"'),
        ({"top_k": 4}, "has no field 'top_k'; did you mean 'top_p'"),
        ({"max_tokens": 0}, "max_tokens is 0, allowed: a whole number, 1 or more"),
        ({"max_tokens": "many"}, "max_tokens is 'many'"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"max_completion_tokens": -1}, "max_completion_tokens is -1"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "above 0"),
        ({"seed": 2**63}, "64 bits"),
        ({"stop": []}, "stop is"),
        ({"stream": "yes"}, "true or false"),
        ({"generation_config": "[]"}, "a JSON object"),
        ({"logit_bias": {"cat": 1}}, "token ids"),
        ({"messages": []}, "one message or more"),
        ({"messages": "hello"}, "one message or more"),
        ({"messages": [{"content": "hello"}]}, "each an object with a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "text as its content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]}, "messages is"),
    ],
)
def test_what_the_server_would_ignore_or_fail_on_is_refused(fields, message):
    with pytest.raises(RequestError) as refused:
        checked_chat(**fields)
    assert message in str(refused.value)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("rules", "required", "body"),
    [
        (CHAT, "messages", {"model": "q4"}),
        (COMPLETIONS, "prompt", {"prompt": None}),
        (COMPLETIONS, "prompt", {"prompt": ""}),
        (COMPLETIONS, "prompt", {"prompt": ["a", "b"]}),
        (COMPLETIONS, "prompt", {"prompt": "a", "logprobs": 0}),
        (COMPLETIONS, "prompt", {"prompt": "a", "echo": True}),
        (RESPONSES, "input", {"input": []}),
        (RESPONSES, "input", {"input": "a", "max_output_tokens": 0}),
        (RESPONSES, "input", {"input": "a", "previous_response_id": "b"}),
    ],
)
def test_other_endpoints_have_their_own_rules(rules, required, body):
    with pytest.raises(RequestError):
        check(body, rules, required)


@pytest.mark.parametrize(
    ("prompt", "asked", "default", "context", "room"),
    [
        (100, 20, None, 128, 20),
        (100, 28, None, 128, 28),
        (100, None, None, 128, 28),  # as long as the context allows, as vLLM does
        (100, None, 8, 128, 8),
        (100, None, 64, 128, 28),
        (100, 500, None, None, 500),
        (100, None, None, None, UNLIMITED),
    ],
)
def test_an_answer_has_the_room_that_its_prompt_leaves(prompt, asked, default, context, room):
    assert room_for_answer(prompt, asked, default, context) == room


@pytest.mark.parametrize(
    ("prompt", "asked", "message"),
    [
        (128, None, "128 tokens in the prompt, allowed: 128 together"),
        (100, 29, "100 tokens in the prompt and 29 for the answer, allowed: 128 together"),
        (0, 5, "no tokens"),
    ],
)
def test_what_does_not_fit_the_context_is_refused(prompt, asked, message):
    with pytest.raises(RequestError, match=message):
        room_for_answer(prompt, asked, None, 128)


def test_errors_have_the_form_of_openai():
    assert error_body("no", 400) == {"error": {"message": "no", "type": "BadRequestError", "param": None, "code": 400}}
    assert error_body("no", 404)["error"]["type"] == "NotFoundError"
    assert error_body("no", 503)["error"]["type"] == "InternalServerError"
