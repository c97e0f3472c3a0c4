"""Every family: what is found foldable, and that a model folded with random transforms gives the same logits."""

import pytest
import torch
from families import FAMILIES, random_model
from torch import nn
from transformers import AutoModelForCausalLM

from pairquant.models.blocks import enter, find_blocks
from pairquant.models.calls import linked
from pairquant.models.foldable import LOOK_TOKENS, Foldable, Heads, look, norm_of
from pairquant.models.foldable_outside import look_outside
from pairquant.models.folding import Transforms, fold
from pairquant.models.sharing import fold_shared, lenders_of

GROUP = 32
TOKENS = torch.arange(3, 67).view(2, 32)
#: Families whose stream cannot be rotated, by what the reason says.
NOT_ROTATED = {
    "adds to the stream": (
        "Gemma 2", "Gemma 3 (text)", "GLM-4", "OLMo 2", "OLMo 3", "EXAONE 4", "FlexOlmo", "AFMoE", "A.X K1", "OLMo hybrid",
    ),
    "adds its output to the stream as it is": ("Inkling (text)",),
    "subtracts the mean": (
        "Phi", "StableLM", "Starcoder2", "GPT-NeoX", "Cohere 2", "Nemotron", "Falcon", "Phi-3.5-MoE", "Cohere 2 MoE",
    ),
    "shares layers with other blocks": ("Zamba", "Zamba2"),
    "hands other blocks more than its states": (
        "Hunyuan 4", "RWKV", "GLM-5", "Gemma 4 (text)", "Gemma 4 (text), experts", "Gemma 3n (text)", "Zaya",
    ),
    "does not run on states of its own": ("xLSTM", "Qwen4 (experimental)", "DeepSeek V4"),
    "has readers that could take its weight": ("MiniMax-01", "A.X K2"),
    "when its inputs are rotated": ("LongCat-Flash", "Llama 4 (text)"),
}  # fmt: skip
#: Families into which nothing is folded.
UNTOUCHED = (
    *NOT_ROTATED["hands other blocks more than its states"], *NOT_ROTATED["does not run on states of its own"],
)  # fmt: skip
REASONS = {name: reason for reason, names in NOT_ROTATED.items() for name in names}


def found_in(model):
    blocks, width = find_blocks(model), model.config.get_text_config().hidden_size
    calls = linked(enter(model, blocks, torch.arange(3, 3 + LOOK_TOKENS)[None], 1).calls)
    lent = {layer for block in blocks for layer in lenders_of(block.module).values()}
    heads = Heads.of(model.config)
    outside = look_outside(model, blocks, width, GROUP, torch.device("cpu"))
    return outside, [look(block, call, width, heads, GROUP, lent) for block, call in zip(blocks, calls, strict=True)]


def random_transforms(found, width, rotate):
    def scales(size):
        return (0.3 * torch.randn(size)).exp()

    def rotation(size):
        return torch.linalg.qr(torch.randn(size // GROUP, GROUP, GROUP))[0]

    return Transforms(
        rotation(width) if rotate else None,
        {norm.place: scales(width) for each in found for norm in each.norms},
        {
            pair.name: (rotation(pair.size) if pair.rotates else None, scales(pair.size))
            for each in found
            for pair in each.pairs
        },
    )


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_folded_model_computes_the_same(name):
    model = random_model(name)
    before = model(TOKENS, use_cache=False).logits
    fold_shared(model)
    outside, found = found_in(model)
    reasons = {reason for reason in (outside.reason, *(each.reason for each in found)) if reason}
    assert bool(reasons) == (name in REASONS), reasons
    assert not reasons or any(REASONS[name] in reason for reason in reasons), reasons
    assert any(each.norms or each.pairs for each in found) == (name not in UNTOUCHED)
    transforms = random_transforms(found, model.config.get_text_config().hidden_size, rotate=not reasons)
    for each in found:
        fold(each, transforms)
    if transforms.stream is not None:
        outside.fold(transforms)
    after = model(TOKENS, use_cache=False).logits
    assert (after - before).norm() < 1e-4 * before.norm()
    assert torch.equal(after, before) == (name in UNTOUCHED)  # something has been done


def pairs_of(found: Foldable):
    return {
        (pair.rows.place.rpartition(".")[2], pair.columns.place.rpartition(".")[2]): pair.rotates
        for pair in found.pairs
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LLaMA 2, 3", {("v_proj", "o_proj"), ("up_proj", "down_proj")}),
        ("Phi-3", {("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj")}),
        ("Arcee", {("v_proj", "o_proj")}),  # no gate: the activation lies between
        ("OLMo 2", {("v_proj", "o_proj"), ("up_proj", "down_proj")}),
        ("DeepSeek V3, Kimi K2", {("up_proj", "down_proj")}),  # a norm lies between q_a_proj and q_b_proj
        ("GPT-NeoX", set()),  # its values lie between queries and keys, head by head
    ],
)
def test_pairs_are_those_with_nothing_between_them(name, expected):
    _, found = found_in(random_model(name))
    assert set(pairs_of(found[0])) == expected


def test_values_of_gated_attention_are_scaled_only_and_others_rotated():
    config = FAMILIES["LLaMA 2, 3"].build()
    config.head_dim = 32
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert pairs_of(found_in(model)[1][0]) == {("v_proj", "o_proj"): True, ("up_proj", "down_proj"): False}
    config = FAMILIES["Qwen3.5 (text)"].build()
    config.head_dim = 32
    model = AutoModelForCausalLM.from_config(config).eval()
    assert pairs_of(found_in(model)[1][1])[("v_proj", "o_proj")] is False


def test_a_reader_that_is_hidden_prevents_the_rotation():
    model = random_model("LLaMA 2, 3")
    block = model.model.layers[1]

    class Odd(type(block)):
        def forward(self, hidden, *args, **kwargs):
            return super().forward(hidden, *args, **kwargs) + 0.1 * hidden.abs()

    block.__class__ = Odd
    _, found = found_in(model)
    assert found[0].reason is None
    assert "differ" in found[1].reason


class Plus(nn.Module):
    """Gemma's norm: 1 + weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64))

    def forward(self, x):
        return x * x.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt() * (1 + self.weight)


class Powered(Plus):
    """No norm: its weight is an exponent."""

    def forward(self, x):
        return x.abs().pow(self.weight)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.RMSNorm(64), (0.0, True)),
        (Plus(), (1.0, True)),
        (nn.LayerNorm(64), (0.0, False)),
        (nn.LayerNorm(64, bias=False), (0.0, False)),
        (Powered(), None),
    ],
    ids=["RMSNorm", "1 + weight", "LayerNorm", "LayerNorm without bias", "none"],
)
@torch.no_grad()
def test_norms_are_known_by_what_they_compute(module, expected):
    norm = norm_of("norm", module, ())
    assert (None if norm is None else (norm.added, norm.rotates)) == expected
