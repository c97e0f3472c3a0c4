"""What a GGUF file says of a model beside its weights, for the families whose arithmetic llama.cpp's names describe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..support.errors import ConfigError, SourceError
from .files import read_json
from .gguf_rope import rope_of
from .read import ModelFiles

if TYPE_CHECKING:
    from gguf import GGUFWriter

#: How digits are cut in the pattern that LLaMA 3's and Qwen's tokenizers share → llama.cpp's name of the whole.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITTINGS = {WORDS % r"\p{N}{1,3}": "llama-bpe", WORDS % r"\p{N}": "qwen2"}
#: What the writer adds itself.
OWN_KEYS = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


@dataclass(frozen=True)
class Family:
    """How llama.cpp holds a family. architecture: its name there; paired: the rows of q_proj and k_proj lie as its rope takes
    them, both of a pair side by side; norm_offset: what its norm weights have in addition; shares: whether the
    weights of a token's experts are divided by their sum there, None for families without experts.
    """

    architecture: str
    paired: bool = False
    norm_offset: float = 0.0
    shares: bool | None = None

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
    "mixtral": Family("llama", paired=True, shares=True),
    "olmoe": Family("olmoe", shares=False),
    "qwen2_moe": Family("qwen2moe", shares=False),
    "qwen3_moe": Family("qwen3moe", shares=True),
}


def family_of(config: Any) -> Family:
    """Return how llama.cpp holds a model; raises `ConfigError` for families that are not known here."""
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"the model is of the family {config.model_type!r}; GGUF files are written for {', '.join(FAMILIES)}. Choose "
            "compressed-tensors, awq, gptq or mlx; or export to bf16, and convert that with llama.cpp's own tools."
        )
    return FAMILIES[config.model_type]


def require_package() -> None:
    """Raise `ConfigError` if the package gguf is missing, which is needed for these files only."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError('GGUF files are written by the package gguf: pip install "pairquant[gguf]"') from error


def require_describable(files: ModelFiles) -> None:
    """Refuse a model that is no GGUF file, and of which one would say something else; raises as `tokenizer_of` does."""
    _require_rope(rope_of(files.config))
    _require_attention(files.config, family_of(files.config))
    _require_experts(files.config, family_of(files.config))
    tokenizer_of(files.directory, files.config.vocab_size)


def _require_attention(config: Any, family: Family) -> None:
    """Refuse windows of attention that llama.cpp does not have for a family: it has one block in six without, for Gemma 3."""
    kinds = getattr(config, "layer_types", None) or []
    sliding = ["sliding" in kind for kind in kinds]
    if family.architecture == "gemma3":
        fits = sliding == [(index + 1) % 6 != 0 for index in range(len(sliding))]
        base = config.rope_parameters.get("sliding_attention", {}).get("rope_theta", 10000.0)
        if fits and base == 10000.0:
            return
        what = "windows in other blocks than five of six" if not fits else f"a rotary base of {base:g} in windows"
    elif any(sliding) or (not kinds and (getattr(config, "sliding_window", None) or 0) > 0):
        what = "attention in windows"
    else:
        return
    raise SourceError(
        f"the model has {what}, which llama.cpp does not have for this family: it would compute something else. Choose another "
        "format, or convert a bf16 export with llama.cpp's own tools."
    )


def _require_experts(config: Any, family: Family) -> None:
    """Refuse experts that llama.cpp would run in another way: it takes every block to have them, and has one rule for their weights."""
    if family.shares is None:
        return
    if getattr(config, "norm_topk_prob", family.shares) != family.shares:
        other = "as they are" if family.shares else "divided by their sum"
        what = f"weights of experts {other} (norm_topk_prob is {config.norm_topk_prob})"
    elif getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        what = "blocks without experts"
    elif getattr(config, "clip_qkv", None):
        what = f"queries, keys and values that are cut off at {config.clip_qkv}"
    else:
        return
    raise SourceError(
        f"the model has {what}, which llama.cpp does not have for this family: it would compute something else. Choose another "
        "format."
    )


def copy_metadata(writer: GGUFWriter, source: Path) -> None:
    """Copy what a GGUF file says: all but its architecture, which the writer has, and the type of its weights."""
    from gguf import GGUFReader, GGUFValueType

    for name, field in GGUFReader(source).fields.items():
        if not name.startswith(OWN_KEYS):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)


def write_metadata(writer: GGUFWriter, files: ModelFiles, config: Any, family: Family, name: str) -> None:
    """Write what config.json and the tokenizer's files say, and the model's name; files: that `require_describable` allows."""
    writer.add_type("model")
    writer.add_name(name)
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
    if family.shares is not None:
        _write_experts(writer, config)
    _write_rope(writer, rope_of(config))
    tokenizer_of(files.directory, config.vocab_size).write(writer, files.directory, config.vocab_size)


def _require_rope(rope: dict[str, Any]) -> str:
    """Return the kind of a rotary embedding, if it can be written."""
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise SourceError(
            f"the rotary embedding is of the kind {kind!r}; in GGUF files default, linear, yarn and llama3 are written. Choose "
            "another format, or convert a bf16 export with llama.cpp's own tools."
        )
    return kind


def _write_experts(writer: GGUFWriter, config: Any) -> None:
    writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if width := getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(width)
    if width := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(width)


def _write_rope(writer: GGUFWriter, rope: dict[str, Any]) -> None:
    from gguf import RopeScalingType

    kind = _require_rope(rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


@dataclass(frozen=True)
class Tokenizer:
    """What a GGUF file says of a tokenizer. model: "gpt2" for merges of bytes, "llama" for scores; splitting: how text is cut
    into words; scores: of the tokens, where there are no merges; prefix: whether a space goes before a text.
    """

    model: str
    splitting: str
    tokens: list[str] | list[bytes]
    kinds: list[int]
    scores: list[float] | None = None
    prefix: bool | None = None

    def write(self, writer: GGUFWriter, directory: Path, size: int) -> None:
        """Write it, and what the tokenizer's own files say of special tokens, merges and the chat template."""
        from gguf import SpecialVocab

        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.splitting)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.prefix is not None:
            writer.add_add_space_prefix(self.prefix)
        SpecialVocab(directory, load_merges=self.scores is None, n_vocab=size).add_to_gguf(writer, quiet=True)


def tokenizer_of(directory: Path, size: int) -> Tokenizer:
    """Read a tokenizer with so many tokens; raises `SourceError` for kinds that are not known here."""
    if (directory / "tokenizer.model").is_file():
        return _of_sentencepiece(directory, size)
    spoken = _spoken(directory)
    splitting = splitting_of(spoken)
    return Tokenizer("gpt2", splitting, *tokens_of(spoken, size))


def _spoken(directory: Path) -> dict[str, Any]:
    """Return the content of tokenizer.json."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise SourceError(f"{directory} has neither tokenizer.json nor tokenizer.model, which a GGUF file needs.")
    return read_json(file)


def _of_sentencepiece(directory: Path, size: int) -> Tokenizer:
    """Read tokenizer.model, and the kinds of added tokens from tokenizer.json, if there is one."""
    from gguf import SentencePieceVocab, TokenType

    try:
        vocabulary = SentencePieceVocab(directory)
    except RuntimeError as error:
        raise SourceError("tokenizer.model needs the package sentencepiece: pip install sentencepiece") from error
    entries = [*vocabulary.all_tokens()][:size]
    entries += [(f"[PAD{i}]".encode(), -10000.0, TokenType.UNUSED) for i in range(len(entries), size)]
    tokens, kinds = [text for text, _, _ in entries], [int(kind) for _, _, kind in entries]
    if (directory / "tokenizer.json").is_file():
        for number, text, kind in _added(_spoken(directory), size):
            tokens[number], kinds[number] = text.encode(), kind
    first = vocabulary.sentencepiece_tokenizer.EncodeAsPieces("a")[0]
    return Tokenizer("llama", "default", tokens, kinds, [score for _, score, _ in entries], first.startswith("\u2581"))


def _added(spoken: dict[str, Any], size: int) -> Iterator[tuple[int, str, int]]:
    """Yield number, text and llama.cpp's kind of the tokens that a tokenizer.json adds to the vocabulary."""
    from gguf import TokenType

    for added in spoken.get("added_tokens", ()):
        if (number := added["id"]) < size:
            yield number, added["content"], int(TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED)


def tokens_of(spoken: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return the tokens of a tokenizer.json by number, and llama.cpp's kind of each; numbers that it leaves out are unused."""
    from gguf import TokenType

    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [int(TokenType.UNUSED)] * size
    for text, number in spoken["model"]["vocab"].items():
        if number < size:
            tokens[number], kinds[number] = text, int(TokenType.NORMAL)
    for number, text, kind in _added(spoken, size):
        tokens[number], kinds[number] = text, kind
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
    if kinds == ["Split", "ByteLevel"] and patterns[0] in SPLITTINGS:
        return SPLITTINGS[patterns[0]]
    raise SourceError(
        f"the tokenizer splits text in a way that is not known here ({json.dumps(outer)[:200]}). Quantize the model's GGUF file, "
        "whose metadata is copied, or convert a bf16 export with llama.cpp's own tools."
    )
