"""`pairquant serve`: the real server, asked by the official client."""

import signal
import socket

import openai
import pytest
from serving import served
from tiny_models import TEXT, save_tiny
from typer.testing import CliRunner

import pairquant
from pairquant.checkpoint.read import ModelFiles
from pairquant.cli.app import app
from pairquant.engines import choice, server
from pairquant.engines.engine import EngineOptions
from pairquant.engines.transformers import TransformersEngine
from pairquant.support.errors import ConfigError, SourceError

#: A prompt that ends where it does, so that the engine below is given the very same tokens.
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
QUESTION = [{"role": "user", "content": "once upon a time"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    config = pairquant.QuantConfig(
        preset="quick", group_size=32, rotations=2, samples=4, seq_len=32, calibration=(str(TEXT),)
    )
    pairquant.quantize(save_tiny(root / "source"), root / "q4", config, device="cpu")
    (root / "q4" / "chat_template.jinja").write_text(TEMPLATE)
    return root


@pytest.fixture(scope="module")
def running(directory):
    with served(directory, "q4 --engine transformers --dtype float32 -- --default-seed 1") as server:
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


def test_another_model_is_refused_and_the_server_lives_on(client):
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="other", messages=QUESTION, max_tokens=3)
    assert client.chat.completions.create(model="q4", messages=QUESTION, max_tokens=3).choices


def test_sigterm_ends_it_cleanly(client, running):
    process = running.process
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (0, -signal.SIGTERM)
    log = running.log.read_text()
    assert f"Finished server process [{process.pid}]" in log  # the command had become the server
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["sauce"], SourceError, "did you mean"),
        (["source", "--engine", "vlm"], ConfigError, "did you mean 'vllm'"),
        (["source", "--engine", "transformers", "--dtype", "bf16"], ConfigError, "did you mean 'bfloat16'"),
        (["source", "--engine", "transformers", "--tensor-parallel", "2"], ConfigError, "Use --engine vllm"),
        (["source", "--engine", "transformers", "--max-model-len", "99"], ConfigError, "only vLLM limits"),
        (["source", "--max-model-len", "0"], ConfigError, "max_model_len 0; allowed: 1 or more"),
        (["source", "--engine", "transformers", "--host", "no such host"], ConfigError, "cannot listen on"),
    ],
)
def test_mistakes_are_told_before_anything_starts(directory, monkeypatch, arguments, error, message):
    monkeypatch.chdir(directory)
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert isinstance(result.exception, error)
    assert message in str(result.exception)


def test_a_port_in_use_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="Choose another --port"):
            server.check_address("127.0.0.1", taken.getsockname()[1])


def test_vllm_serves_under_the_name_that_was_given(directory, monkeypatch):
    monkeypatch.chdir(directory)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    files = ModelFiles.find("q4", trust_remote_code=True)
    options = server.ServerOptions(port=8001, tensor_parallel=2, extra=("--seed", "3"))
    made = server.command("vllm", files, options)
    assert made.arguments[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert set(made.arguments[3:]) >= {
        "--model=q4", "--served-model-name=q4", "--port=8001", "--dtype=bfloat16", "--max-model-len=-1",
        "--tensor-parallel-size=2", "--trust-remote-code",
    }  # fmt: skip
    assert made.arguments[-2:] == ["--seed", "3"]
    assert made.environment["VLLM_CPU_KVCACHE_SPACE"] == server.CPU_CACHE_GIB
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert server.command("vllm", files, options).environment["VLLM_CPU_KVCACHE_SPACE"] == "7"


def test_files_and_names_that_a_server_cannot_take_are_refused(directory):
    gguf = ModelFiles("m.gguf", directory, "m.gguf", False)
    with pytest.raises(ConfigError, match="Use --engine transformers"):
        choice.choose("vllm", gguf, prefer_vllm=True)
    assert f"{directory}:m.gguf" in server.command("transformers", gguf, server.ServerOptions()).arguments
    with pytest.raises(ConfigError, match="reads what follows '@'"):
        server.command("transformers", ModelFiles("q4@home", directory, None, False), server.ServerOptions())
