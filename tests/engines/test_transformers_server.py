"""`pairquant serve --engine transformers`: the real server on a quantized model, asked by the official client."""

import json
import signal
import urllib.error
import urllib.request

import openai
import pytest
import torch
from serving import served
from tiny_models import save_tiny

import pairquant
from pairquant.checkpoint.read import ModelFiles
from pairquant.engines.engine import EngineOptions
from pairquant.engines.transformers import TransformersEngine

#: A prompt that ends where it does, so that the engine below is given the very same tokens.
TEMPLATE = (
    "{% for message in messages %}{% if message.role != 'user' %}{{ raise_exception('only users speak here') }}{% endif %}"
    "{{ message.content }}{% endfor %}"
)
QUESTION = [{"role": "user", "content": "once upon a time"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    config = pairquant.QuantConfig(preset="rtn", group_size=32)
    pairquant.quantize(save_tiny(root / "source"), root / "q4", config, device="cpu")
    (root / "q4" / "chat_template.jinja").write_text(TEMPLATE)
    return root


@pytest.fixture(scope="module")
def running(directory):
    with served(
        directory, "q4 --engine transformers --dtype float32 --max-model-len 100 -- --default-seed 1"
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(running):
    return running.client()


@pytest.fixture(scope="module")
def expected(directory):
    files = ModelFiles.find(str(directory / "q4"))
    return "".join(TransformersEngine(files, EngineOptions("cpu", "float32")).stream(QUESTION, 10))


def test_the_answer_is_that_of_the_quantized_model(client, expected):
    answer = client.chat.completions.create(model="q4", messages=QUESTION, max_tokens=10, temperature=0)
    assert answer.choices[0].message.content == expected
    assert answer.usage.completion_tokens == 10


def test_a_streamed_answer_comes_in_pieces(client, expected):
    chunks = list(
        client.chat.completions.create(model="q4", messages=QUESTION, max_tokens=10, temperature=0, stream=True)
    )
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 1
    # Streamed, bytes that are no whole character are told one by one.
    assert "".join(pieces).replace("\ufffd", "") == expected.replace("\ufffd", "")


def test_the_models_are_the_one_that_is_served(client):
    with urllib.request.urlopen(f"{client.base_url}models") as answer:  # newer clients drop what OpenAI does not say
        (model,) = json.load(answer)["data"]
    assert (model["id"], model["owned_by"], model["max_model_len"]) == ("q4", "pairquant", 100)


def test_a_completion_is_that_of_the_quantized_model(client, expected):
    options = {"model": "q4", "prompt": "once upon a time", "max_tokens": 10, "temperature": 0}
    answer = client.completions.create(**options)
    assert answer.choices[0].text == expected
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 10)
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)]
    assert "".join(pieces).replace("\ufffd", "") == expected.replace("\ufffd", "")


def test_the_newer_name_limits_the_answer(client):
    answer = client.chat.completions.create(model="q4", messages=QUESTION, max_completion_tokens=3, temperature=0)
    assert answer.usage.completion_tokens == 3


def test_an_answer_ends_where_the_context_does(client):
    answer = client.completions.create(model="q4", prompt="a" * 95, temperature=0)
    assert answer.usage.prompt_tokens == 95
    assert answer.usage.completion_tokens <= 5
    response = client.responses.create(model="q4", input="a" * 95, temperature=0)
    assert response.usage.output_tokens <= 5


def test_a_temperature_samples(client):
    options = {"model": "q4", "prompt": "once upon a time", "max_tokens": 10, "temperature": 1.5}
    first, again, other = (client.completions.create(**options, seed=seed).choices[0].text for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 2}, "n is 2, allowed: 1"),
        ({"max_tokens": 0}, "max_tokens is 0, allowed: a whole number, 1 or more"),
        ({"max_tokens": 99}, "allowed: 100 together"),
        ({"extra_body": {"top_k": 5}}, "has no field 'top_k'"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ["chat", "text"])
def test_what_the_engine_cannot_do_is_refused(client, options, message, stream, endpoint):
    asked = {
        "chat": lambda: client.chat.completions.create(model="q4", messages=QUESTION, stream=stream, **options),
        "text": lambda: client.completions.create(model="q4", prompt="once", stream=stream, **options),
    }
    with pytest.raises(openai.BadRequestError) as refused:
        asked[endpoint]()
    assert message in refused.value.body["message"]
    assert (refused.value.body["type"], refused.value.body["code"]) == ("BadRequestError", 400)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_context_is_refused(client, stream):
    for ask in (
        lambda: client.chat.completions.create(
            model="q4", messages=[{"role": "user", "content": "a" * 200}], stream=stream
        ),
        lambda: client.completions.create(model="q4", prompt="a" * 200, stream=stream),
        lambda: client.responses.create(model="q4", input="a" * 200, stream=stream),
    ):
        with pytest.raises(openai.BadRequestError, match="200 tokens in the prompt, allowed: 100 together"):
            ask()


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("v1/chat/completions", b"{not json", 400, "is no JSON object"),
        ("v1/chat/completions", b"[]", 400, "is no JSON object"),
        ("v1/chat/completions", b'{"model": "q4", "messages": []}', 400, "messages is []"),
        ("v1/chat/completions", b'{"model": "q4"}', 400, "messages is missing"),
        ("v1/completions", b'{"model": "q4", "prompt": ""}', 400, "prompt is ''"),
        ("v1/completions", b'{"model": "other", "prompt": "a"}', 404, "model is 'other', allowed: 'q4'"),
        ("load_model", b'{"model": "other"}', 404, "Not Found"),
        ("reset", b"{}", 404, "Not Found"),
    ],
)
def test_every_error_has_the_form_of_openai(running, client, path, body, status, message):
    request = urllib.request.Request(f"{running.url}/{path}", data=body, headers={"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == status
    error = json.loads(refused.value.read())["error"]
    assert message in error["message"]
    assert error["code"] == status
    assert client.completions.create(model="q4", prompt="a", max_tokens=1).choices  # it lives on


def test_a_refusal_of_the_chat_template_is_told(client):
    with pytest.raises(openai.BadRequestError, match="only users speak here"):
        client.chat.completions.create(model="q4", messages=[{"role": "system", "content": "be kind"}])


def test_an_overflow_is_told_and_not_answered_with_nothing(tmp_path):
    model = TransformersEngine(ModelFiles.find(str(save_tiny(tmp_path / "big"))), EngineOptions("cpu", "float32")).model
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    model.save_pretrained(tmp_path / "big")
    with served(tmp_path, "big --engine transformers --dtype float16") as server:
        client = server.client()
        with pytest.raises(openai.InternalServerError, match="not finite in float16.*--dtype bfloat16"):
            client.completions.create(model="big", prompt="once", max_tokens=3)
        with pytest.raises(openai.APIError, match="not finite in float16"):
            list(client.completions.create(model="big", prompt="once", max_tokens=3, stream=True))


def test_sigterm_ends_it_cleanly(client, running):
    process = running.process
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (0, -signal.SIGTERM)
    log = running.log.read_text()
    assert f"Finished server process [{process.pid}]" in log  # the command had become the server
    assert "Traceback" not in log
