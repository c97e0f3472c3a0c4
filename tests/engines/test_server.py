"""The commands that start the engines' servers, and the address that they listen on."""

import socket
import sys

import pytest
from tiny_models import save_tiny

from pairquant.checkpoint.read import ModelFiles
from pairquant.engines import choice, server
from pairquant.support.errors import ConfigError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("server")
    save_tiny(root / "model")
    return root


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16"}, "did you mean 'bfloat16'"),
        ({"max_model_len": 0}, "max_model_len 0; allowed: 1 or more"),
        ({"tensor_parallel": 0}, "tensor_parallel is 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        server.ServerOptions(**options)


def test_addresses_that_cannot_be_listened_on_are_told():
    with pytest.raises(ConfigError, match="cannot listen on no such host:1"):
        server.check_address("no such host", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="Choose another --port"):
            server.check_address("127.0.0.1", taken.getsockname()[1])


def test_vllm_serves_under_the_name_that_was_given(directory, monkeypatch):
    monkeypatch.chdir(directory)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    files = ModelFiles.find("model", trust_remote_code=True)
    options = server.ServerOptions(port=8001, tensor_parallel=2, extra=("--seed", "3"))
    made = server.command("vllm", files, options)
    assert made.arguments[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert set(made.arguments[3:]) >= {
        "--model=model", "--served-model-name=model", "--port=8001", "--dtype=bfloat16", "--max-model-len=-1",
        "--tensor-parallel-size=2", "--trust-remote-code",
    }  # fmt: skip
    assert made.arguments[-2:] == ["--seed", "3"]
    assert made.environment["VLLM_CPU_KVCACHE_SPACE"] == server.CPU_CACHE_GIB
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert server.command("vllm", files, options).environment["VLLM_CPU_KVCACHE_SPACE"] == "7"


def test_transformers_serves_under_the_name_that_was_given(directory, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    files = ModelFiles("owner/model", directory / "model", None, trust_remote_code=True)
    options = server.ServerOptions(port=8001, max_model_len=100, extra=("--default-seed", "3"))
    made = server.command("transformers", files, options)
    assert made.arguments == [
        sys.executable, "-m", "pairquant.engines.transformers_server", "--served-model-name=owner/model",
        "--max-model-len=100", "serve", str(directory / "model"), "--host=127.0.0.1", "--port=8001", "--dtype=bfloat16",
        "--trust-remote-code", "--default-seed", "3",
    ]  # fmt: skip


def test_what_transformers_cannot_serve_is_refused(directory):
    files = ModelFiles.find(str(directory / "model"))
    with pytest.raises(ConfigError, match="Use --engine vllm"):
        server.command("transformers", files, server.ServerOptions(tensor_parallel=2))
    with pytest.raises(ConfigError, match="max_model_len is 129, allowed: up to 128"):
        server.command("transformers", files, server.ServerOptions(max_model_len=129))


def test_files_and_directories_that_a_server_cannot_take_are_refused(directory, monkeypatch):
    monkeypatch.setattr(choice, "find_spec", lambda name: object())  # as if vLLM were installed
    gguf = ModelFiles("m.gguf", directory, "m.gguf", False)
    with pytest.raises(ConfigError, match="Use --engine transformers"):
        choice.choose("vllm", gguf, prefer_vllm=True)
    away = save_tiny(directory / "model@home")
    with pytest.raises(ConfigError, match="for a revision. Rename the directory"):
        server.command("transformers", ModelFiles.find(str(away)), server.ServerOptions())


def test_a_missing_package_is_told_with_the_remedy(directory, monkeypatch):
    monkeypatch.setattr(server, "SERVING_PACKAGES", ("fastapi", "nonesuch"))
    with pytest.raises(ConfigError, match=r"needs nonesuch. Run: pip install 'pairquant\[serve\]'"):
        server.command("transformers", ModelFiles.find(str(directory / "model")), server.ServerOptions())
