"""Makes a small Qwen2 whose q, k and v have biases, with outlier channels: does a quantizer, and our reading of it, cope?

    python benchmarks/peers/biased.py DIR [--bias 1.0]
    python benchmarks/bench_peers.py --model DIR --group-size 128 --peer llmcompressor-rtn llmcompressor-awq --bits 4

Random weights, three blocks of 256 channels, tied embeddings. Norms' weights are log-normal, so that single channels of what
linears read are many times larger than others, as in trained models.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CONFIG = Qwen2Config(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip


@torch.no_grad()
def biased(bias: float) -> Qwen2ForCausalLM:
    """bias: the standard deviation of the biases."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(CONFIG).eval()
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.copy_(torch.randn_like(parameter).exp())
        elif name.endswith("bias"):
            parameter.copy_(bias * torch.randn_like(parameter))
        elif parameter.ndim == 2 and "embed" not in name:
            parameter.mul_(3)  # as first drawn, blocks add next to nothing
    return model


def tokenizer_of_bytes() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    symbols = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bias", type=float, default=1.0)
    options = parser.parse_args()
    biased(options.bias).save_pretrained(options.folder)
    tokenizer_of_bytes().save_pretrained(options.folder)


if __name__ == "__main__":
    main()
