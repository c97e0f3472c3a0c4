"""The command that starts an engine's own OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..checkpoint.read import ModelFiles
from ..support.errors import ConfigError
from .engine import VLLM_LOADER, check_dtype

#: What vLLM's cache may take on a CPU, GiB, unless the user says otherwise; vLLM would take most of the machine.
CPU_CACHE_GIB = "2"
#: What Transformers' server imports, of its extra "serving".
SERVING_PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic")


@dataclass(frozen=True)
class ServerOptions:
    """max_model_len: longest sequence in tokens; None for what memory allows. extra: further arguments, for the engine's
    server as they are."""

    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "auto"
    max_model_len: int | None = None
    tensor_parallel: int = 1
    extra: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raises `ConfigError`."""
        check_dtype(self.dtype)
        if self.tensor_parallel < 1 or (self.max_model_len is not None and self.max_model_len < 1):
            raise ConfigError(
                f"tensor_parallel is {self.tensor_parallel}, max_model_len {self.max_model_len}; allowed: 1 or more"
            )


@dataclass(frozen=True)
class Command:
    """arguments: the program first; environment: all of it."""

    arguments: list[str]
    environment: dict[str, str]

    def replace_process(self) -> None:
        """Become the server: signals, terminal and exit code are then its own. Does not return."""
        os.execve(self.arguments[0], self.arguments, self.environment)


def command(engine: str, files: ModelFiles, options: ServerOptions) -> Command:
    """How `engine` serves a model, under the name that the user gave; raises `ConfigError` for what it cannot do."""
    build = {"vllm": _vllm, "transformers": _transformers}[engine]
    return build(files, options)


def check_address(host: str, port: int) -> None:
    """Raises `ConfigError` when the server could not listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}. Choose another --port or --host.") from error


def _vllm(files: ModelFiles, options: ServerOptions) -> Command:
    on_cpu = not torch.cuda.is_available()
    arguments = {
        "model": str(files.directory),
        "served-model-name": files.name,
        "host": options.host,
        "port": options.port,
        "dtype": "bfloat16" if on_cpu and options.dtype == "auto" else options.dtype,
        "max-model-len": options.max_model_len or -1,  # -1: as long as the cache allows
        "tensor-parallel-size": options.tensor_parallel,
        "model-loader-extra-config": json.dumps(VLLM_LOADER),
    }
    # `vllm serve` looks for a package of that name, and does not find vllm-cpu.
    return _python(
        "vllm.entrypoints.openai.api_server",
        [*_flags(arguments, files.trust_remote_code), *options.extra],
        {"VLLM_CPU_KVCACHE_SPACE": CPU_CACHE_GIB} if on_cpu else {},
    )


def _transformers(files: ModelFiles, options: ServerOptions) -> Command:
    missing = [name for name in SERVING_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"Transformers' server needs {', '.join(missing)}. Run: pip install 'pairquant[serve]'")
    if options.tensor_parallel > 1:
        raise ConfigError(
            f"tensor_parallel is {options.tensor_parallel}, which only vLLM can do. Use --engine vllm; Transformers' "
            "server spreads the layers over all GPUs by itself."
        )
    if options.max_model_len is not None:
        raise ConfigError(f"max_model_len is {options.max_model_len}, which only vLLM limits. Leave it out.")
    name = f"{files.directory}:{files.gguf}" if files.gguf else files.name
    if "@" in name:
        raise ConfigError(f"Transformers' server reads what follows '@' in {name!r} as a revision. Rename the model.")
    dtype = "bfloat16" if options.dtype == "auto" and not torch.cuda.is_available() else options.dtype
    arguments = {"host": options.host, "port": options.port, "dtype": dtype}
    return _python(
        f"{__package__}.transformers_server",
        ["serve", name, *_flags(arguments, files.trust_remote_code), *options.extra],
        {},
    )


def _flags(arguments: Mapping[str, object], trust_remote_code: bool) -> list[str]:
    flags = [f"--{name}={value}" for name, value in arguments.items()]
    return [*flags, "--trust-remote-code"] if trust_remote_code else flags


def _python(module: str, arguments: Sequence[str], defaults: Mapping[str, str]) -> Command:
    """`python -m module arguments`, in this environment and what it leaves open of the defaults."""
    environment = {**defaults, **os.environ}
    environment.pop("TQDM_DISABLE", None)  # that was for our own output
    return Command([sys.executable, "-m", module, *arguments], environment)
