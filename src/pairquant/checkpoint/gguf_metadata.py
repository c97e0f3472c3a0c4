"""What a GGUF file says of a model beside its weights, for the families whose arithmetic llama.cpp's names describe."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..support.errors import ConfigError, SourceError
from .files import read_json
from .read import ModelFiles

if TYPE_CHECKING:
    from gguf import GGUFWriter

#: What the writer adds itself.
OWN_KEYS = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


@dataclass(frozen=True)
class Family:
    """How llama.cpp holds a family. architecture: its name there; paired: the rows of q_proj and k_proj lie as its rope takes
    them, both of a pair side by side; norm_offset: what its norm weights have in addition.
    """

    architecture: str
    paired: bool = False
    norm_offset: float = 0.0

    def rows(self, path: str, value: Tensor, config: Any) -> Tensor:
        """Return a weight or bias, rows first, with its rows in llama.cpp's order."""
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = heads.get(path.rpartition(".")[2])
        if not self.paired or count is None:
            return value
        return value.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)


#: `model_type` of config.json → how llama.cpp holds it.
FAMILIES = {
    "llama": Family("llama", paired=True),
    "mistral": Family("llama", paired=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma3_text": Family("gemma3", norm_offset=1.0),
}


def family_of(config: Any) -> Family:
    """Return how llama.cpp holds a model; raises `ConfigError` for families that are not known here."""
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"the model is of the family {config.model_type!r}; GGUF files are written for {', '.join(FAMILIES)}. Choose "
            "compressed-tensors, awq, gptq or mlx; or export to bf16, and convert that with llama.cpp's own tools."
        )
    return FAMILIES[config.model_type]


def require_writable(files: ModelFiles) -> None:
    """Refuse a model of which no GGUF file can be written; raises as `write_metadata` does, and `family_of`."""
    family_of(files.config)
    if files.gguf:
        return
    _require_rope(rope_of(files.config))
    if not (files.directory / "tokenizer.model").is_file():
        splitting_of(_spoken(files.directory))


def copy_metadata(writer: GGUFWriter, source: Path) -> None:
    """Copy what a GGUF file says: all but its architecture, which the writer has, and the type of its weights."""
    from gguf import GGUFReader, GGUFValueType

    for name, field in GGUFReader(source).fields.items():
        if not name.startswith(OWN_KEYS):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)


def write_metadata(writer: GGUFWriter, files: ModelFiles, config: Any, family: Family) -> None:
    """Write what config.json and the tokenizer's files say. Raises `SourceError` for what has no place in a GGUF file."""
    writer.add_type("model")
    writer.add_name(files.directory.name)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(width)
    if (window := getattr(config, "sliding_window", None)) and family.architecture == "gemma3":
        writer.add_sliding_window(window)
    _write_rope(writer, rope_of(config))
    _write_tokenizer(writer, files.directory, config.vocab_size)


def rope_of(config: Any) -> dict[str, Any]:
    """Return the parameters of the rotary embedding; of a model with two kinds of attention, those of its full attention."""
    rope = config.rope_parameters
    return rope.get("full_attention", rope)


def _require_rope(rope: dict[str, Any]) -> str:
    """Return the kind of a rotary embedding, if it can be written."""
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise SourceError(
            f"the rotary embedding is of the kind {kind!r}; in GGUF files default, linear, yarn and llama3 are written. Choose "
            "another format, or convert a bf16 export with llama.cpp's own tools."
        )
    return kind


def _write_rope(writer: GGUFWriter, rope: dict[str, Any]) -> None:
    from gguf import RopeScalingType

    kind = _require_rope(rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def rope_factors(config: Any) -> Tensor | None:
    """Return what the frequencies are divided by, float32 [head width / 2]; None unless they are stretched as LLaMA 3.1's.

    Waves longer than the context that the model was trained on, divided by `low_freq_factor`, are stretched by `factor`,
    those shorter than it divided by `high_freq_factor` are not, and those between by something in between.
    """
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    kept = ((rope["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - kept) / factor + kept)).float()


def _write_tokenizer(writer: GGUFWriter, directory: Path, size: int) -> None:
    """Write tokens, their kinds, and what belongs to the kind of tokenizer: scores, or merges and the splitting of words."""
    from gguf import SpecialVocab

    if (directory / "tokenizer.model").is_file():
        _write_sentencepiece(writer, directory, size)
        SpecialVocab(directory, n_vocab=size).add_to_gguf(writer, quiet=True)
        return
    spoken = _spoken(directory)
    tokens, kinds = tokens_of(spoken, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting_of(spoken))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    SpecialVocab(directory, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def _spoken(directory: Path) -> dict[str, Any]:
    """Return the content of tokenizer.json."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise SourceError(f"{directory} has neither tokenizer.json nor tokenizer.model, which a GGUF file needs.")
    return read_json(file)


def _write_sentencepiece(writer: GGUFWriter, directory: Path, size: int) -> None:
    from gguf import SentencePieceVocab, TokenType

    try:
        vocabulary = SentencePieceVocab(directory)
    except RuntimeError as error:
        raise SourceError("tokenizer.model needs the package sentencepiece: pip install sentencepiece") from error
    tokens = [*vocabulary.all_tokens()][:size]
    tokens += [(f"[PAD{i}]".encode(), -10000.0, TokenType.UNUSED) for i in range(len(tokens), size)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in tokens])
    writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])


def tokens_of(spoken: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return the tokens of a tokenizer.json by number, and llama.cpp's kind of each; numbers that it leaves out are unused."""
    from gguf import TokenType

    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [int(TokenType.UNUSED)] * size
    for text, number in spoken["model"]["vocab"].items():
        if number < size:
            tokens[number], kinds[number] = text, int(TokenType.NORMAL)
    for added in spoken.get("added_tokens", ()):
        if (number := added["id"]) < size:
            kind = TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
            tokens[number], kinds[number] = added["content"], int(kind)
    return tokens, kinds


def splitting_of(spoken: dict[str, Any]) -> str:
    """Return llama.cpp's name of the way in which a tokenizer.json splits text into words, `tokenizer.ggml.pre`.

    Raises `SourceError` for one that is not known here: with a wrong name the file would load, and read text wrongly.
    """
    if spoken["model"].get("type") != "BPE" or spoken["model"].get("byte_fallback"):
        raise SourceError(
            f"the tokenizer is of the kind {spoken['model'].get('type')!r}, and there is no tokenizer.model, whose scores a GGUF "
            "file needs. Copy the original model's tokenizer.model into the checkpoint's directory."
        )
    outer = spoken.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    kinds = [step.get("type") for step in steps]
    patterns = [step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and "\\p{N}{1,3}" in patterns[0]:
        return "llama-bpe"
    if kinds == ["Split", "ByteLevel"] and "|\\p{N}|" in patterns[0]:
        return "qwen2"
    raise SourceError(
        f"the tokenizer splits text in a way that is not known here ({json.dumps(outer)[:200]}). Quantize the model's GGUF file, "
        "whose metadata is copied, or convert a bf16 export with llama.cpp's own tools."
    )
