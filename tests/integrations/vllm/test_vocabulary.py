"""How packed embeddings come into vLLM: padded, in parts, or refused; the output's is multiplied, the input's looked up."""

from types import SimpleNamespace

import pytest
import torch

from pairquant.core.linear import Transform, decode, encode
from pairquant.spec.linear import Spec
from pairquant.spec.recipe import PRESETS
from pairquant.support.errors import CheckpointError, ConfigError

pytest.importorskip("vllm", reason="needs vLLM")
CHANNELS, VOCABULARY, PADDED = 64, 96, 128


def packed(bits):
    weight = torch.randn(VOCABULARY, CHANNELS, generator=torch.Generator().manual_seed(0))
    layout = Spec(bits, 32, 0).layout(CHANNELS, VOCABULARY)
    return encode(weight, Transform.identity(CHANNELS, 32), None, layout, PRESETS["rtn"])


def layer_of(rank, ranks):
    """What vLLM's layer says of itself on one rank."""
    layer = torch.nn.Module()
    rows = PADDED // ranks
    first, last = (min(VOCABULARY, rows * place) for place in (rank, rank + 1))
    layer.org_vocab_size, layer.tp_rank = VOCABULARY, rank
    layer.shard_indices = SimpleNamespace(org_vocab_start_index=first, org_vocab_end_index=last)
    return layer, rows


def loaded(linear, rank, ranks, kind="PairQuantHeadMethod"):
    from pairquant.integrations.vllm import vocabulary

    layer, rows = layer_of(rank, ranks)
    method = getattr(vocabulary, kind)(linear.layout.spec, "lm_head")
    method.create_weights(layer, CHANNELS, [rows], CHANNELS, PADDED, torch.float32)
    for name, tensor in linear.tensors.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor)
    method.process_weights_after_loading(layer)
    return method, layer


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_hold_their_rows_and_zeros_after_the_last(bits, ranks):
    linear = packed(bits)
    x = torch.randn(3, CHANNELS)
    parts = []
    for rank in range(ranks):
        method, layer = loaded(linear, rank, ranks)
        parts.append(method.apply(layer, x))
    found = torch.cat(parts, dim=-1)
    assert found.shape == (3, PADDED)
    torch.testing.assert_close(found[:, :VOCABULARY], x @ decode(linear).T, rtol=1e-4, atol=1e-4)
    assert (found[:, VOCABULARY:] == 0).all()


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_look_up_their_own_rows(bits, ranks):
    linear, first = packed(bits), 0
    for rank in range(ranks):
        method, layer = loaded(linear, rank, ranks, "PairQuantEmbeddingMethod")
        shard = layer.shard_indices
        count = shard.org_vocab_end_index - shard.org_vocab_start_index
        tokens = torch.tensor([0, count - 1, 5, 5])
        torch.testing.assert_close(
            method.embedding(layer, tokens), decode(linear)[first + tokens], rtol=1e-5, atol=1e-6
        )
        assert method.embedding(layer, tokens[:0]).shape == (0, CHANNELS)
        first += count


def test_packed_words_are_not_split():
    from pairquant.integrations.vllm.vocabulary import PairQuantHeadMethod

    layer, rows = layer_of(1, 8)
    with pytest.raises(ConfigError, match=r"lm_head with 128 rows at 3 bits cannot be split .* packed in 32s"):
        PairQuantHeadMethod(Spec(3, 32, 0), "lm_head").create_weights(
            layer, CHANNELS, [rows], CHANNELS, PADDED, torch.float32
        )


def test_tensors_of_another_vocabulary_or_dtype_are_refused():
    from pairquant.integrations.vllm.vocabulary import PairQuantHeadMethod

    layer, rows = layer_of(0, 1)
    PairQuantHeadMethod(Spec(4, 32, 0), "lm_head").create_weights(
        layer, CHANNELS, [rows], CHANNELS, PADDED, torch.float32
    )
    with pytest.raises(CheckpointError, match=r"lm_head.qweight has shape \[64, 16\], must be \[64, 12\]"):
        layer.qweight.weight_loader(layer.qweight, torch.zeros(64, 16, dtype=torch.int32))
    with pytest.raises(CheckpointError, match="lm_head.scales is torch.float32"):
        layer.scales.weight_loader(layer.scales, torch.zeros(2, 96))
