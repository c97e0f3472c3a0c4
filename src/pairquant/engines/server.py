"""Builds the command that starts an engine's own OpenAI-compatible server."""

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
from .engine import VLLM_LOADER, check_dtype, context_of

#: Size of vLLM's cache on a CPU, in GiB, unless the user sets it; vLLM by itself takes most of the machine's memory.
CPU_CACHE_GIB = "2"
#: What Transformers' server imports, of its extra "serving".
SERVING_PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic")


@dataclass(frozen=True)
class ServerOptions:
    """Say how to serve a model.

    max_model_len: longest sequence in tokens; None for what memory (vLLM) or the model (Transformers) allows.
    extra: arguments that are handed to the engine's server as they are.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "auto"
    max_model_len: int | None = None
    tensor_parallel: int = 1
    extra: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the values; raises `ConfigError`."""
        check_dtype(self.dtype)
        if self.tensor_parallel < 1 or (self.max_model_len is not None and self.max_model_len < 1):
            raise ConfigError(
                f"tensor_parallel is {self.tensor_parallel}, max_model_len {self.max_model_len}; allowed: 1 or more"
            )


@dataclass(frozen=True)
class Command:
    """Holds a command line, the program first, and the whole environment that it runs in."""

    arguments: list[str]
    environment: dict[str, str]

    def replace_process(self) -> None:
        """Turn this process into the server, which then has the signals, the terminal and the exit code; never returns."""
        os.execve(self.arguments[0], self.arguments, self.environment)


def command(engine: str, files: ModelFiles, options: ServerOptions) -> Command:
    """Return the command by which `engine` serves a model under the name that the user gave.

    Raises `ConfigError` for options that the engine does not have.
    """
    build = {"vllm": _vllm, "transformers": _transformers}[engine]
    return build(files, options)


def check_address(host: str, port: int) -> None:
    """Refuse an address on which the server could not listen; raises `ConfigError`."""
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
    context = context_of(files.config)
    if options.max_model_len is not None and context is not None and options.max_model_len > context:
        raise ConfigError(f"max_model_len is {options.max_model_len}, allowed: up to {context}, the model's context.")
    directory = f"{files.directory}:{files.gguf}" if files.gguf else str(files.directory)
    if "@" in directory:
        raise ConfigError(
            f"Transformers' server takes what follows '@' in {directory!r} for a revision. Rename the directory."
        )
    ours = {"served-model-name": files.name}
    if options.max_model_len is not None:
        ours["max-model-len"] = str(options.max_model_len)
    dtype = "bfloat16" if options.dtype == "auto" and not torch.cuda.is_available() else options.dtype
    theirs = {"host": options.host, "port": options.port, "dtype": dtype}
    return _python(
        f"{__package__}.transformers_server",
        [*_flags(ours, False), "serve", directory, *_flags(theirs, files.trust_remote_code), *options.extra],
        {},
    )


def _flags(arguments: Mapping[str, object], trust_remote_code: bool) -> list[str]:
    flags = [f"--{name}={value}" for name, value in arguments.items()]
    return [*flags, "--trust-remote-code"] if trust_remote_code else flags


def _python(module: str, arguments: Sequence[str], defaults: Mapping[str, str]) -> Command:
    """Return the command `python -m module arguments`; defaults: variables that the environment may set otherwise."""
    environment = {**defaults, **os.environ}
    environment.pop("TQDM_DISABLE", None)  # that was for our own output
    return Command([sys.executable, "-m", module, *arguments], environment)
