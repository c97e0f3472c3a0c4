"""Hidden states on their way: in smaller pieces when memory runs out, and back from what was stored."""

import pytest
import torch
from agreement import ROUNDING, distance
from tiny_models import tiny_model

from pairquant.models.blocks import find_blocks
from pairquant.optimize.streams import Places, Streams

CPU = torch.device("cpu")


@pytest.fixture
def notices():
    return []


@pytest.fixture
def streams(notices):
    model = tiny_model()
    blocks = find_blocks(model)
    tokens = torch.randint(3, 259, (7, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        yield blocks, Streams.start(model, blocks, tokens, True, Places(CPU, CPU, torch.float32), notices.append)


def limited(block, most):
    """Make the block run out of memory beyond `most` windows."""
    plain = type(block.module).forward

    def forward(hidden, *args, **kwargs):
        if len(hidden) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(block.module, hidden, *args, **kwargs)

    block.module.forward = forward


@pytest.mark.parametrize("most", [1, 2, 3])
def test_micro_batches_halve_until_they_fit_and_nothing_else_changes(streams, notices, most):
    blocks, stream = streams
    expected = torch.cat([stream.calls[0].run(blocks[0].module, hidden) for hidden in stream.quantized])
    limited(blocks[0], most)
    stream.advance(blocks[0], 0)
    assert distance(torch.cat(stream.quantized), expected) <= ROUNDING[torch.float32]
    assert notices[0] == "out of memory: going on with micro-batches of 3 windows instead of 7"
    assert len(notices) == {1: 2, 2: 2, 3: 1}[most]
    stream.advance(blocks[1], 1)
    assert len(notices) == {1: 2, 2: 2, 3: 1}[most], "said again"


def test_moments_do_not_depend_on_the_pieces(streams):
    blocks, stream = streams
    before = list(stream.original)
    whole = stream.observe(blocks[0], 0).checked(blocks[0].sites)[0]
    stream.original = before
    limited(blocks[0], 2)
    pieces = stream.observe(blocks[0], 0).checked(blocks[0].sites)[0]
    for one, other in zip(whole, pieces, strict=True):
        assert one.readers == other.readers
        torch.testing.assert_close(one.hessian, other.hessian, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(one.cross, other.cross, rtol=1e-4, atol=1e-3)


def test_a_single_window_that_does_not_fit_is_an_error(streams):
    blocks, stream = streams
    limited(blocks[0], 0)
    with pytest.raises(torch.OutOfMemoryError):
        stream.advance(blocks[0], 0)


def test_what_was_stored_comes_back(streams):
    blocks, stream = streams
    stored = {name: tensor.clone() for name, tensor in stream.tensors().items()}
    stream.advance(blocks[0], 0)
    stream.restore(stored)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in stream.tensors().items())
