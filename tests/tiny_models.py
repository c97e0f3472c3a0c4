"""Tiny models of many families, built from their configs with random weights, and a tokenizer to go with them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

SIZES = {
    "vocab_size": 288,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=16),
    "gemma2": Gemma2Config(**SIZES, sliding_window=16, query_pre_attn_scalar=32),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
    "glm4": Glm4Config(**SIZES),
    "phi3": Phi3Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
}


def tiny_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32):
    """A random model whose linears have a few outlier input channels, as real ones do."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(deepcopy(FAMILIES[family])).eval().to(dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
                module.weight.mul_(4)
                module.weight[:, ::29] *= 6
                if module.bias is not None:
                    module.bias.normal_(std=0.1)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: ids 0 to 2 are special, 3 + b stands for byte b."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{symbol: 3 + i for i, symbol in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def beginning_tokenizer(prefix: str = "<s>") -> PreTrainedTokenizerFast:
    """The same, which puts special tokens before every text, as Gemma's and Llama 3's do."""
    tokenizer = byte_tokenizer()
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in prefix.split()]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{prefix} $A", special_tokens=ids)
    return tokenizer


#: Short calibration text: the bundled one takes a byte tokenizer ten seconds.
TEXT = Path(__file__).parent / "text.txt"


def save_tiny(
    directory: Path, family: str = "llama", dtype: torch.dtype = torch.float32, context: int | None = None
) -> Path:
    """A model directory, as a user would have it. context: most positions, instead of the family's."""
    model = tiny_model(family, dtype=dtype)
    model.config.max_position_embeddings = context or model.config.max_position_embeddings
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


#: So that servers can be talked to.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def save_trained(directory: Path, steps: int = 300) -> Path:
    """A LLaMA that has learnt to spell `TEXT`: unlike a random model's, its next token is seldom a matter of rounding."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(FAMILIES["llama"]))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokens = torch.tensor(tokenizer(TEXT.read_text())["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - 64, (16, 1))
        batch = tokens[starts + torch.arange(64)]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
