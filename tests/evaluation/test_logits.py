"""Logits made a few positions at a time are the model's own, and where that cannot be vouched for, the model's own are taken."""

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from torch import nn

from pairquant.evaluation import logits
from pairquant.evaluation.logits import chunks, logits_over


@pytest.fixture
def window():
    return torch.randint(3, 259, (12,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("positions", "vocabulary", "expected"),
    [
        (range(0, 5), 10, [slice(0, 2), slice(2, 4), slice(4, 5)]),
        (range(3, 7), 10, [slice(3, 5), slice(5, 7)]),
        (range(0, 2), 1000, [slice(0, 1), slice(1, 2)]),  # one position is the least, however large
        (range(0, 3), 2, [slice(0, 3)]),
        (range(4, 4), 2, []),
    ],
)
def test_chunks_cover_the_positions_once_and_stay_below_the_limit(monkeypatch, positions, vocabulary, expected):
    monkeypatch.setattr(logits, "CHUNK_NUMBERS", 20)
    assert chunks(positions, vocabulary) == expected


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_each_chunk_is_the_model_s_own_and_no_other_position_is_made(family, window):
    model, made = tiny_model(family), []
    own = model(window[None]).logits[0]
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: made.append(output.shape[:-1].numel())
    )
    chunk = logits_over(model, window)
    for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
        found = chunk(rows)
        assert (found - own[rows]).norm() <= 1e-4 * own[rows].norm()
    assert max(made) == 6


@torch.no_grad()
def test_the_body_runs_once(window):
    model, calls = tiny_model(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    chunk = logits_over(model, window)
    for position in range(12):
        chunk(slice(position, position + 1))
    assert len(calls) == 1


class Whole(nn.Module):
    """A model that is not divided into a body and an output embedding."""

    def __init__(self, table):
        super().__init__()
        self.table, self.calls = table, 0

    def forward(self, input_ids, use_cache):
        self.calls += 1
        return type("Output", (), {"logits": self.table[input_ids]})


def test_a_model_of_one_piece_gives_all_its_logits_at_once(window):
    model = Whole(torch.randn(259, 7, generator=torch.Generator().manual_seed(0)))
    chunk = logits_over(model, window)
    assert torch.equal(chunk(slice(2, 4)), model.table[window[2:4]])
    assert torch.equal(chunk(slice(4, 12)), model.table[window[4:]])
    assert model.calls == 1


@torch.no_grad()
def test_a_body_that_gives_other_positions_than_it_was_asked_for_is_not_trusted(window):
    model = tiny_model()
    own = model(window[None]).logits[0]
    # As multi-token heads and packed inputs do: the hook that reads the body's states sees a longer sequence.
    model.model.register_forward_hook(
        lambda module, inputs, output: type(output)(output[0].repeat(1, 2, 1)), prepend=True
    )
    model.register_forward_hook(lambda module, inputs, output: type("Output", (), {"logits": own[None]}))
    assert torch.equal(logits_over(model, window)(slice(3, 6)), own[3:6])
