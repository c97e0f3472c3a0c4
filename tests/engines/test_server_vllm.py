"""A real vLLM server on a trained model quantized by us, asked by the official client."""

import json
import signal
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from agreement import FACTOR, Agreement, log_probabilities, rms
from serving import served
from tiny_models import TEXT, byte_tokenizer, save_trained

import pairquant

pytest.importorskip("vllm", reason="needs vLLM")

NEW_TOKENS = 24
PROMPTS = [
    "The king said to", "Once upon a time there was", "Then he went to", "The old woman", "She looked at the", "The wolf",
    "In the forest", "When they came home", "His father", "But the little", "They were", "And as he", "There she", "One day",
    "The bird", "I will give you", "What have you", "The door was", "Through the night", "At last",
]  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("vllm-server")
    config = pairquant.QuantConfig(
        preset="quick", group_size=64, rotations=4, samples=8, seq_len=64, calibration=(str(TEXT),)
    )
    pairquant.quantize(save_trained(root / "source"), root / "tiny-PARO", config, device="cpu")
    return root


@pytest.fixture(scope="module")
def agreement(directory):
    return Agreement(directory / "tiny-PARO")


@pytest.fixture(scope="module")
def prompts():
    """Token ids of each."""
    return byte_tokenizer()(PROMPTS)["input_ids"]


@pytest.fixture(scope="module")
def server(directory):
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    arguments = "tiny-PARO --engine vllm --max-model-len 128 -- --enforce-eager --max-num-seqs 32"
    with served(directory, arguments, environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def complete(client, prompt, **options):
    return client.completions.create(model="tiny-PARO", prompt=prompt, temperature=0, **options).choices[0]


def test_chat_and_its_stream_say_the_same(client):
    question = [{"role": "user", "content": "Once upon a time there was"}]
    options = {"model": "tiny-PARO", "messages": question, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message.content
    chunks = list(client.chat.completions.create(**options, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert sum(bool(piece) for piece in pieces) > 1
    assert "".join(pieces) == whole
    assert whole.strip()


def test_log_probabilities_are_those_of_the_reference(client, agreement, prompts):
    found, expected, noise = [], [], []
    for tokens in prompts:
        options = {"max_tokens": 1, "logprobs": 5, "extra_body": {"return_tokens_as_token_ids": True}}
        (place,) = complete(client, tokens, **options).logprobs.top_logprobs
        likely = torch.tensor([int(name.removeprefix("token_id:")) for name in place])
        exact, rounded = (
            log_probabilities(model, tokens)[-1, likely] for model in (agreement.exact, agreement.rounded)
        )
        found.append(torch.tensor(list(place.values())))
        expected.append(exact)
        noise.append(rounded - exact)
    errors = torch.cat(found) - torch.cat(expected)
    assert len(errors) >= 5 * len(PROMPTS)
    assert rms(errors) <= FACTOR * rms(torch.cat(noise))


def test_greedy_answers_are_the_likeliest_tokens_up_to_rounding(client, agreement, prompts):
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda tokens: tokens_of_answer(client, tokens), prompts))
    agreement.check_greedy(prompts, answers)


def tokens_of_answer(client, tokens) -> list[int]:
    """As they were generated: to encode the text again need not give them."""
    answer = complete(client, tokens, max_tokens=NEW_TOKENS, extra_body={"return_token_ids": True})
    return answer.token_ids


def test_32_requests_at_once_get_the_answers_they_get_alone(client, agreement, prompts):
    """Up to rounding: batches of another size sum in another order."""
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda _: tokens_of_answer(client, prompts[2]), range(32)))
    alone = tokens_of_answer(client, prompts[2])
    assert len(together) == 32
    agreement.check_greedy([prompts[2]] * 33, [alone, *together])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{not json", {400, 422}),
        (json.dumps({"model": "tiny-PARO", "messages": "no list"}).encode(), {400, 422}),
        (json.dumps({"model": "another", "messages": [{"role": "user", "content": "hi"}]}).encode(), {404}),
        (json.dumps({"model": "tiny-PARO", "messages": [], "max_tokens": -5}).encode(), {400, 422}),
    ],
)
def test_a_malformed_request_is_refused_and_the_server_lives_on(server, client, body, status):
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", data=body, headers={"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code in status
    assert complete(client, PROMPTS[0], max_tokens=2).text


def test_sigterm_ends_it_cleanly(server, client):
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=60) in (0, -signal.SIGTERM)
