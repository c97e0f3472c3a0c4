"""vLLM behind the engine protocol. In a process of its own: vLLM binds threads and memory of the one it runs in."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import save_tiny

from pairquant.checkpoint.read import ModelFiles
from pairquant.engines.engine import EngineOptions
from pairquant.engines.transformers import TransformersEngine
from pairquant.evaluation.generation import GREEDY, generate

SCRIPT = """
import json, sys, torch
from pairquant.checkpoint.read import ModelFiles
from pairquant.engines.engine import EngineOptions
from pairquant.engines import vllm
from pairquant.engines.vllm import VllmEngine, arguments, cache_bytes
from pairquant.support.errors import ConfigError
from pairquant.evaluation.reasoning import AnswerPlan

files = ModelFiles.find(sys.argv[1])
try:
    VllmEngine.place("meta")
except ConfigError as error:
    refused = str(error)
engine = VllmEngine(files, EngineOptions(dtype="float32", sequences=3, sequence_tokens=32))
prompts = torch.randint(3, 259, (3, 10), generator=torch.Generator().manual_seed(1))
run = engine.generate(prompts, 6)
conversation = [{"role": "user", "content": "once upon a time"}]
answer = "".join(engine.stream(conversation, 12))
pieces = engine.stream(conversation, 100)
next(pieces)
pieces.close()
try:
    next(engine.stream([{"role": "user", "content": "word " * 200}], 5))
except ConfigError as error:
    too_long = str(error)
def answers(plan):
    found = dict(engine.answer(prompts.tolist(), plan))
    return [[found[row].tokens, found[row].finished] for row in range(3)]

greedy, *sampled = (answers(AnswerPlan(20, temperature=t, seed=s)) for t, s in ((0, 0), (1.0, 1), (1.0, 1), (1.0, 2)))
vllm.free_bytes = lambda device: files.size_bytes() + 20_000_000
capped = [
    arguments(files, EngineOptions(dtype="float32", sequences=n, sequence_tokens=129))["kv_cache_memory_bytes"]
    for n in (1, 1000)
]
engine.llm.apply_model(lambda model: [weight.data.fill_(float("nan")) for weight in model.parameters()] and None)
try:
    list(engine.stream(conversation, 5))
except ConfigError as error:
    overflow = str(error)
print("RESULT", json.dumps({
    "overflow": overflow,
    "capped": capped, "one_sequence": cache_bytes(files.config, 1, 129, 4),
    "tokens": run.tokens.tolist(), "decoded": run.decoded, "first_token_s": run.first_token_s, "decode_s": run.decode_s,
    "answer": answer, "unfinished": engine.llm.llm_engine.has_unfinished_requests(), "refused": refused,
    "too_long": too_long, "cache_bytes": cache_bytes(files.config, 3, 129, 4),
    "greedy": greedy, "sampled": sampled, "told": [engine.name, engine.dtype, engine.compiled, engine.vocabulary, engine.context],
}))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model that says 254 as the seventh token of one of three answers, where it is to end."""
    model = save_tiny(tmp_path_factory.mktemp("vllm") / "model")
    defaults = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(defaults | {"eos_token_id": [2, 254]}))
    return model


@pytest.fixture(scope="module")
def result(directory):
    pytest.importorskip("vllm")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(directory)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("RESULT ")[2])


@pytest.fixture(scope="module")
def other(directory):
    return TransformersEngine(ModelFiles.find(str(directory)), EngineOptions("cpu", "float32"))


def test_tokens_are_those_of_transformers_and_all_are_counted(result, other):
    prompts = torch.randint(3, 259, (3, 10), generator=torch.Generator().manual_seed(1))
    assert result["tokens"] == other.generate(prompts, 6).tokens.tolist()
    assert result["decoded"] == 3 * 5
    assert result["first_token_s"] > 0
    assert result["decode_s"] > 0


def test_answers_are_those_of_transformers_up_to_their_end(result, other):
    prompts = torch.randint(3, 259, (3, 10), generator=torch.Generator().manual_seed(1))
    found = generate(other.model, prompts.tolist(), 20, GREEDY)
    assert result["greedy"] == [[each.tokens, each.finished] for each in found]
    assert [each.finished for each in found].count(True) == 1


def test_answers_are_sampled_by_seed(result):
    first, again, another = result["sampled"]
    assert first == again
    assert first != another != result["greedy"]


def test_the_streamed_answer_is_that_of_transformers(result, other):
    expected = "".join(other.stream([{"role": "user", "content": "once upon a time"}], 12))
    # vLLM keeps back, for good, a character that the last tokens have only begun.
    assert result["answer"].rstrip("\ufffd") == expected.rstrip("\ufffd")
    assert len(result["answer"]) > 5


def test_closing_the_stream_aborts_the_request(result):
    assert result["unfinished"] is False


def test_other_devices_and_too_long_conversations_are_refused(result):
    assert "device is 'meta'" in result["refused"]
    assert "Begin a new one" in result["too_long"]


def test_logits_that_are_not_finite_are_told(result):
    assert "logits are not finite in float32" in result["overflow"]


def test_what_was_loaded_is_told(result):
    name, dtype, compiled, vocabulary, context = result["told"]
    assert (name, dtype, vocabulary, context) == ("vllm", "float32", 288, 128)
    assert compiled == torch.cuda.is_available()


def test_the_cache_is_as_large_as_its_sequences(result):
    blocks, layers, heads, head_dim = 3 * 2 + 1, 2, 2, 32
    assert result["cache_bytes"] == blocks * 128 * layers * heads * head_dim * 2 * 4


def test_the_cache_leaves_memory_free_and_has_room_for_one_sequence(result):
    assert result["capped"] == [result["one_sequence"], 16_000_000]
