"""Perplexity, KL and agreement against numbers worked out another way."""

import math

import pytest
import torch
from models import tiny_model
from torch import nn

from pairquant.evaluation.quality import measure


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
