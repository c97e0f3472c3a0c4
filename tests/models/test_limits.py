"""What a model can take: learned positions are found by looking, token ids by the embedding."""

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, GPTNeoConfig, OPTConfig

from pairquant.models.limits import check_length, check_tokens, learned_positions
from pairquant.support.errors import ConfigError, SourceError

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def model_of(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (GPT2Config(vocab_size=50, n_positions=40, n_embd=32, n_layer=1, n_head=2), 40),
        (OPTConfig(**SMALL, max_position_embeddings=40, ffn_dim=32, word_embed_proj_dim=32), 40),
        (
            GPTNeoConfig(
                vocab_size=50, hidden_size=32, num_layers=1, num_heads=2, max_position_embeddings=40,
                attention_types=[[["global"], 1]],
            ),
            40,
        ),
        (BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2), None),  # ALiBi
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_learned_positions(config, positions):
    model = model_of(config)
    assert learned_positions(model) == positions
    if positions:
        assert check_length(model, positions) is None
        with pytest.raises(ConfigError, match=f"seq_len is {positions + 1}, allowed: up to {positions}"):
            check_length(model, positions + 1)
    else:
        assert check_length(model, 10_000) is None


def test_what_is_refused_fails_and_what_is_allowed_runs():
    """The largest window allowed is the model's own."""
    config = OPTConfig(**SMALL, max_position_embeddings=40, ffn_dim=32, word_embed_proj_dim=32)
    model = AutoModelForCausalLM.from_config(config).eval()
    model(torch.zeros(1, 40, dtype=torch.long))
    with pytest.raises(IndexError):
        model(torch.zeros(1, 41, dtype=torch.long))


def test_rotary_positions_only_have_a_notice():
    model = tiny_model()
    assert learned_positions(model) is None
    assert check_length(model, 128) is None
    assert "129 tokens are longer than the 128" in check_length(model, 129)


def test_token_ids_are_compared_with_the_embedding():
    model = tiny_model()
    check_tokens(model, "m", torch.tensor([[0, 287]]), [3, 287], [], torch.empty(0, 4, dtype=torch.int64))
    for tokens in (torch.tensor([[0, 288]]), [1, 288]):
        with pytest.raises(SourceError, match="token id 288, but 'm' only has embeddings for ids 0 to 287.*tokenizer"):
            check_tokens(model, "m", [5], tokens)
