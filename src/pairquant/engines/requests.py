"""Checks requests to Transformers' server before it runs them.

`transformers serve` ignores some fields of OpenAI's interface, takes others to mean something else, and fails with
status 500 on values that make no sense. The tables here say, for each endpoint, which fields it obeys and with which
values; everything else is refused, so that no answer differs silently from what was asked for.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..support.errors import PairQuantError, did_you_mean

#: Fields that change no answer: bookkeeping of OpenAI's own service, and usage numbers, which are always sent.
HARMLESS = frozenset({
    "metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "stream_options", "user",
})  # fmt: skip
#: Tokens of an answer where neither request nor model limits it.
UNLIMITED = 1024
INSTEAD = "Leave it out, or serve the model with --engine vllm."


class RequestError(PairQuantError, ValueError):
    """A request that the server cannot answer. status: of the HTTP response, 400 to 499."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Rule:
    """Which values a field may have. allowed: the same in words; remedy: what to do with other values."""

    allowed: str
    accepts: Callable[[Any], bool]
    remedy: str = ""


def only(*values: Any) -> Rule:
    """Allow only the values that change nothing, for a field that Transformers' server does not obey."""
    allowed = " or ".join(json.dumps(value) for value in values) or "null"
    return Rule(f"{allowed} on the engine Transformers", lambda value: value in values, INSTEAD)


def whole(low: int, high: int) -> Callable[[Any], bool]:
    """Accept whole numbers from low to high."""
    return lambda value: type(value) is int and low <= value <= high


def error_body(message: str, status: int) -> dict[str, Any]:
    """Return the JSON of an error response as OpenAI's clients expect it."""
    kinds = {400: "BadRequestError", 404: "NotFoundError", 422: "BadRequestError"}
    kind = kinds.get(status, "InternalServerError" if status >= 500 else "InvalidRequestError")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def check(body: dict[str, Any], rules: Mapping[str, Rule], required: str) -> None:
    """Check a request's fields and drop, in place, those that change nothing.

    required: the field that must be there. A field that is null counts as left out. Raises `RequestError`.
    """
    for name in [name for name, value in body.items() if value is None or name in HARMLESS]:
        del body[name]
    for name, value in body.items():
        if name not in rules:
            raise RequestError(
                f"the engine Transformers has no field {name!r}{did_you_mean(name, rules) or '.'} {INSTEAD}"
            )
        rule = rules[name]
        if not rule.accepts(value):
            raise RequestError(f"{name} is {reprlib.repr(value)}, allowed: {rule.allowed}. {rule.remedy}".rstrip())
    if required not in body:
        raise RequestError(f"{required} is missing, allowed: {rules[required].allowed}.")
    if "max_completion_tokens" in body:  # the newer name, which Transformers' server ignores
        body["max_tokens"] = body.pop("max_completion_tokens")


def room_for_answer(prompt: int, asked: int | None, default: int | None, context: int | None) -> int:
    """Return how many tokens an answer may have: what is asked for, else what the model allows, as vLLM does.

    prompt: tokens of the prompt; asked: tokens that the request asks for; default: the model's own limit; context: the
    longest sequence. Raises `RequestError` when prompt and answer do not fit.
    """
    if prompt < 1:
        raise RequestError("the prompt has no tokens, allowed: 1 or more.")
    if context is None:
        return asked or default or UNLIMITED
    room = context - prompt
    if room < 1 or (asked or 0) > room:
        wish = f" and {asked} for the answer" if asked else ""
        raise RequestError(
            f"the request has {prompt} tokens in the prompt{wish}, allowed: {context} together, with 1 or more for the "
            "answer. Shorten the prompt or lower max_tokens."
        )
    return asked or min(default or room, room)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_stop(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and value != [] and all(map(_is_text, value)))


def _is_json_object(value: Any) -> bool:
    try:
        return isinstance(json.loads(value), dict)
    except (TypeError, ValueError):
        return False


def _is_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(key.isdecimal() and _is_number(bias) for key, bias in value.items())


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_text(value.get("role")):
        return False
    content, calls = value.get("content"), value.get("tool_calls", [])
    return _is_content(content) and isinstance(calls, list) and all(map(_is_call, calls))


def _is_content(value: Any) -> bool:
    """Return whether it is text, in one piece or in parts; Transformers' server would leave out parts of other kinds."""
    if isinstance(value, list):
        return all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in value)
    return value is None or isinstance(value, str)


def _is_call(value: Any) -> bool:
    function = value.get("function") if isinstance(value, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    return isinstance(arguments, dict) or _is_json_object(arguments)


TOKENS = Rule("a whole number, 1 or more", whole(1, 2**31))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))
LIST = Rule("a list", lambda value: isinstance(value, list))
TEXT = Rule("a string", lambda value: isinstance(value, str))
COMMON = {
    "model": TEXT,
    "temperature": Rule("a number, 0 or more", lambda value: _is_number(value) and value >= 0),
    "top_p": Rule("a number above 0, up to 1", lambda value: _is_number(value) and 0 < value <= 1),
    "seed": Rule("a whole number of 64 bits", whole(-(2**63), 2**63 - 1)),
    "stream": Rule("true or false", lambda value: isinstance(value, bool)),
    "generation_config": Rule("a string that holds a JSON object", _is_json_object),
}
COMPLETIONS = COMMON | {
    "prompt": Rule("a string that is not empty", _is_text),
    "max_tokens": TOKENS,
    "stop": Rule("a string, or a list of strings", _is_stop),
    "suffix": TEXT,
    "n": only(1),
    "best_of": only(1),
    "echo": only(False),
    "logprobs": only(),
    "logit_bias": only({}),
    "presence_penalty": only(0),
    "frequency_penalty": only(0),  # Transformers' server would make a repetition penalty of it, which is another thing
}
CHAT = COMMON | {
    "messages": Rule(
        "a list of one message or more, each an object with a role, and with text as its content",
        lambda value: isinstance(value, list) and value != [] and all(map(_is_message, value)),
    ),
    "max_tokens": TOKENS,
    "max_completion_tokens": TOKENS,
    "stop": Rule("a string, or a list of strings", _is_stop),
    "logit_bias": Rule("an object of token ids and numbers", _is_bias),
    "tools": LIST,
    "chat_template_kwargs": OBJECT,
    "n": only(1),
    "logprobs": only(False),
    "top_logprobs": only(0),
    "presence_penalty": only(0),
    "frequency_penalty": only(0),
    "response_format": only({"type": "text"}),
    "tool_choice": only("auto"),
    "parallel_tool_calls": only(True),
    "modalities": only(["text"]),
}
RESPONSES = COMMON | {
    "input": Rule("a string or a list that is not empty", lambda value: isinstance(value, (str, list)) and bool(value)),
    "instructions": TEXT,
    "max_output_tokens": TOKENS,
    "tools": LIST,
    "chat_template_kwargs": OBJECT,
    "background": only(False),
    "include": only([]),
    "tool_choice": only("auto"),
    "parallel_tool_calls": only(True, False),
    "top_logprobs": only(0),
    "truncation": only("disabled"),
    "text": only({"format": {"type": "text"}}),
}
