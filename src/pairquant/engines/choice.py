"""Chooses an engine by name, checks a model for it, and starts it."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from typing import Any

import torch

from ..checkpoint.read import Checkpoint, ModelFiles
from ..spec.linear import check_fields
from ..support.errors import ConfigError, did_you_mean
from .engine import Engine, EngineOptions, chat_tokens

#: Name → module here and class in it.
ENGINES = {"transformers": ("transformers", "TransformersEngine"), "vllm": ("vllm", "VllmEngine")}


def choose(name: str, files: ModelFiles, prefer_vllm: bool) -> str:
    """Return the engine's name; "auto" is vLLM when it is preferred, installed and can read the files, else Transformers.

    Raises `ConfigError` for an unknown name, and for vLLM where it is missing or cannot read the files.
    """
    allowed = ("auto", *ENGINES)
    if name not in allowed:
        raise ConfigError(f"engine is {name!r}, allowed: {', '.join(allowed)}{did_you_mean(name, allowed)}")
    installed = find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise ConfigError("engine is 'vllm', which is not installed. Run: pip install 'pairquant[vllm]'")
    if name == "vllm" and files.gguf:
        raise ConfigError(f"{files.name!r} is a GGUF file, which vLLM does not run. Use --engine transformers.")
    if name == "auto":
        return "vllm" if prefer_vllm and installed and not files.gguf else "transformers"
    return name


def vllm_version() -> str:
    """Return the version of the installed vLLM, whatever its package is called, without importing it."""
    return version(packages_distributions()["vllm"][0])


def gpu_wanted(device: str) -> bool:
    """Tell whether "auto" or "cuda…" will be an NVIDIA GPU, where vLLM is the faster engine."""
    return device != "cpu" and torch.cuda.is_available() and torch.version.cuda is not None


def check_model(files: ModelFiles) -> Any:
    """Check in a second what an engine would find after a minute, and return the tokenizer.

    Reads the configuration and the tokenizer, looks whether tensors are missing, and for our checkpoints reads every header
    and the values of the plain tensors, which not every engine checks. Raises `SourceError` or `CheckpointError`.
    """
    files.require_loadable()
    if files.is_packed:
        checkpoint = Checkpoint.open(files)
        checkpoint.check_plain()
        for path in checkpoint.stored.linears():
            check_fields(path, checkpoint.layout(path), checkpoint.stored.fields_of(path))
    files.config.get_text_config()  # raises where the configuration needs code that comes with the model
    return files.tokenizer()


def check_template(tokenizer: Any) -> None:
    """Refuse a chat template that is broken; raises `SourceError`.

    A template that refuses this conversation passes: it may ask for another form.
    """
    with suppress(ConfigError):
        chat_tokens(tokenizer, [{"role": "user", "content": "Hello"}])


def engine_class(name: str) -> type[Engine]:
    """Import the engine's library, which nothing imports before, and return its class."""
    module, attribute = ENGINES[name]
    return getattr(import_module(f".{module}", __package__), attribute)


def start(name: str, files: ModelFiles, options: EngineOptions) -> Engine:
    """Load a model that `check_model` has passed; `name` comes from `choose`."""
    return engine_class(name)(files, options)
