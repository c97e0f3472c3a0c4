"""Everything of a checkpoint but its weights: config.json, tokenizer, and what else the source has."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from .files import checksum, read_json
from .side_files import copy_side_files

#: Names of the dtype in config.json, that of Transformers 5 first. Where a source has neither, the older: all readers know it.
DTYPE_KEYS = ("dtype", "torch_dtype")
#: The key of config.json for an output embedding that is the input embedding.
TIED = "tie_word_embeddings"
README = "README.md"


def describe_copy(
    source: Path,
    directory: Path,
    model: Any,
    dtype: torch.dtype,
    quantization: dict[str, Any] | None,
    untied: bool = False,
) -> None:
    """Copy the source's files, and write its config.json key for key with `quantization_config` added; None: of a plain model.

    untied: say that the output embedding is no longer the input embedding.

    Where the source names no class or dtype, that of `model` and of the stored tensors is added: with the codes beside
    them, readers could not tell any more.
    """
    copy_side_files(source, directory)
    config = read_json(source / "config.json")
    if not any(config.get(key) for key in DTYPE_KEYS):
        config[next((key for key in DTYPE_KEYS if key in config), DTYPE_KEYS[-1])] = _named(dtype)
    if not config.get("architectures"):
        config["architectures"] = [type(model).__name__]
    if untied:
        untie(config)
    config.pop("quantization_config", None)
    write_config(directory, config if quantization is None else config | {"quantization_config": quantization})


def untie(config: dict[str, Any]) -> None:
    """State in a configuration, and in that of its language model, that the two embeddings are separate."""
    config[TIED] = False
    for name, inner in config.items():
        if isinstance(inner, dict) and (TIED in inner or name == "text_config"):
            inner[TIED] = False


def describe_anew(
    directory: Path,
    model: Any,
    tokenizer: Any,
    dtype: torch.dtype,
    quantization: dict[str, Any] | None,
    untied: bool = False,
) -> None:
    """Save what a GGUF file has no files of, with Transformers: configuration, generation defaults, tokenizer.

    quantization, untied: as for `describe_copy`.
    """
    config = copy.deepcopy(model.config)
    if untied:
        config.tie_word_embeddings = False
    config.architectures, config.dtype = [type(model).__name__], dtype
    if quantization is not None:
        config.quantization_config = quantization
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Write config.json, indented as Transformers does."""
    (directory / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def state_dtype(config: dict[str, Any], dtype: torch.dtype) -> None:
    """Name the dtype in the configuration and those within it (of models with several parts), under the keys in use."""
    for key in [key for key in DTYPE_KEYS if key in config] or DTYPE_KEYS[-1:]:
        config[key] = _named(dtype)
    for inner in config.values():
        if isinstance(inner, dict) and any(key in inner for key in DTYPE_KEYS):
            state_dtype(inner, dtype)


def state_rope(config: dict[str, Any]) -> None:
    """Also name the parameters of the rotary embedding as Transformers 4 did: other programs would take their own defaults.

    (mlx-lm 0.32 takes a base of 10,000 for LLaMA without `rope_theta`.)
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" in config:
        return
    whole = rope.get("full_attention", rope)
    if "rope_theta" in whole:
        config["rope_theta"] = whole["rope_theta"]
    if whole.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", {name: value for name, value in whole.items() if name != "rope_theta"})
    if "rope_theta" in rope.get("sliding_attention", {}):
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]


def state_experts(config: dict[str, Any]) -> None:
    """Also give the number of experts the name that it had in Transformers 4, by which mlx-lm 0.32 reads it."""
    if "num_local_experts" in config:
        config.setdefault("num_experts", config["num_local_experts"])


def readme_digest(directory: Path) -> str | None:
    """Return the SHA-256 of the model card, by which the source's is told from one that was written since; None without one."""
    readme = directory / README
    return checksum(readme) if readme.is_file() else None


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
