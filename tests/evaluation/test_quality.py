"""Perplexity, KL and agreement against numbers worked out another way."""

import math

import pytest
import torch
from tiny_models import FAMILIES, SIZES, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from pairquant.evaluation import logits
from pairquant.evaluation.logits import logits_over
from pairquant.evaluation.quality import by_position, measure


class Fixed(nn.Module):
    """Gives the logits it was made with, whatever the tokens."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids, use_cache):
        return type("Output", (), {"logits": self.logits[None]})


def test_uniform_logits_have_the_vocabulary_as_perplexity():
    quality = measure(Fixed(torch.zeros(9, 50)), torch.randint(0, 50, (3, 9)))
    assert quality.perplexity == pytest.approx(50)
    assert quality.tokens == 3 * 8
    assert quality.kl is None


def test_kl_and_agreement_by_hand():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.3, 0.5, 0.2])
    by_hand = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    windows = torch.zeros(2, 4, dtype=torch.long)
    quality = measure(Fixed(q.log().repeat(4, 1)), windows, Fixed(p.log().repeat(4, 1)))
    assert quality.kl == pytest.approx(by_hand, rel=1e-5)
    assert quality.top1 == 0
    assert quality.perplexity == pytest.approx(1 / 0.3, rel=1e-5)


def test_a_model_does_not_differ_from_itself():
    model = tiny_model()
    windows = torch.randint(3, 259, (2, 400 // 4))
    quality = measure(model, windows, model)
    assert quality.kl == pytest.approx(0, abs=1e-7)
    assert quality.top1 == 1


def test_perplexity_equals_transformers_own_loss():
    model = tiny_model()
    windows = torch.randint(3, 259, (1, 90))
    with torch.no_grad():
        loss = model(windows, labels=windows).loss
    assert measure(model, windows).perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def windows_of(count, length, seed=0):
    return torch.randint(3, 259, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=FAMILIES)
def pair(request):
    return tiny_model(request.param, seed=0), tiny_model(request.param, seed=1)


@torch.no_grad()
def test_chunks_of_positions_add_up_to_the_direct_computation(pair, monkeypatch):
    monkeypatch.setattr(logits, "CHUNK_NUMBERS", 288 * 7)  # seven positions at a time
    monkeypatch.setattr("pairquant.evaluation.quality.PIECE_NUMBERS", 288 * 3)  # compared in three pieces
    model, reference = pair
    windows = windows_of(3, 40)
    log_p, log_q = (network(windows).logits[:, :-1].log_softmax(-1) for network in pair)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    quality = measure(model, windows, reference)
    assert quality.kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert quality.kl_of_windows == pytest.approx(kl.mean(1).tolist(), rel=1e-4)
    assert quality.top1 == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).float().mean().item())
    loss = -log_p.gather(-1, windows[:, 1:, None]).mean().item()
    assert quality.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    parts = quality.kl_by_position
    assert (parts[0]["start"], parts[-1]["end"], len(parts)) == (0, 39, 8)
    first = parts[0]
    assert first["kl"] == pytest.approx(kl[:, first["start"] : first["end"]].mean().item(), rel=1e-4)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operator makes while the mode is on."""

    numbers = 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        result = operator(*arguments, **(options or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        self.numbers = max([self.numbers, *(each.numel() for each in made if isinstance(each, torch.Tensor))])
        return result


def gemma(**changes):
    """A vocabulary of Gemma's size, everything else tiny."""
    sizes = SIZES | {"hidden_size": 8, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 262_144}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma2Config(**sizes, query_pre_attn_scalar=8, **changes)).eval()
    model.lm_head.weight.data.mul_(500)  # far into the cap
    return model


def test_logits_over_a_vocabulary_of_262k_tokens_are_never_held_whole(monkeypatch):
    monkeypatch.setattr(logits, "CHUNK_NUMBERS", 2**22)
    model, window = gemma(), windows_of(1, 40)
    with LargestTensor() as largest:
        measure(model, window, model)
    assert largest.numbers <= 2**22 < 39 * 262_144


@torch.no_grad()
@pytest.mark.parametrize(
    "build",
    [
        lambda: gemma(final_logit_softcapping=3.0),
        lambda: AutoModelForCausalLM.from_config(CohereConfig(**SIZES, logit_scale=0.0625)).eval(),
        lambda: AutoModelForCausalLM.from_config(GraniteConfig(**SIZES, logits_scaling=8.0)).eval(),
    ],
    ids=["capped", "multiplied", "divided"],
)
def test_what_models_do_to_their_logits_is_done_to_each_chunk(build):
    model, window = build(), windows_of(1, 12)[0]
    own, rows = model(window[None]).logits[0], []
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, made: rows.append(made.shape[:-1].numel())
    )
    found = logits_over(model, window)(slice(3, 5))
    torch.testing.assert_close(found, own[3:5], rtol=1e-4, atol=1e-5)
    assert max(rows) == 2


@torch.no_grad()
def test_a_model_that_does_something_else_to_its_logits_gives_them_itself():
    model, window = tiny_model(), windows_of(1, 12)[0]
    forward = model.forward

    def squared(input_ids, use_cache=False, logits_to_keep=0):
        output = forward(input_ids, use_cache=use_cache, logits_to_keep=logits_to_keep)
        output.logits = output.logits**2
        return output

    model.forward = squared
    torch.testing.assert_close(logits_over(model, window)(slice(0, 12)), squared(window[None]).logits[0])


def test_rows_of_unequal_length_are_averaged_over_those_that_get_there():
    parts = by_position([torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0, 5.0, 7.0])], bins=2)
    assert parts == [{"start": 0, "end": 2, "kl": 2.0}, {"start": 2, "end": 4, "kl": 6.0}]
    assert by_position([torch.tensor([2.0])], bins=8) == [{"start": 0, "end": 1, "kl": 2.0}]


def test_what_windows_begin_with_is_not_predicted():
    logits = torch.zeros(6, 50)
    logits[0, 7] = 20  # certain of a token that does not follow
    windows = torch.ones(2, 6, dtype=torch.long)
    quality = measure(Fixed(logits), windows, start=2)
    assert quality.tokens == 2 * 4
    assert quality.perplexity == pytest.approx(50)
    assert measure(Fixed(logits), windows).perplexity > 100
