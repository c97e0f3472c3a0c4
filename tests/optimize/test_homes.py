"""A block that enters is on the device in the dtype of the work, and leaves as it was stored."""

import pytest
import torch
from tiny_models import tiny_model

from pairquant.models.blocks import find_blocks
from pairquant.optimize.homes import InPlace

CPU = torch.device("cpu")


def test_a_block_leaves_as_it_was_stored():
    block, other = find_blocks(tiny_model(dtype=torch.bfloat16))
    before = {name: p.clone() for name, p in block.module.named_parameters()}
    home = InPlace()
    assert home.dtype(block) == torch.bfloat16
    home.enter(block, CPU, torch.float32)
    assert {p.dtype for p in block.module.parameters()} == {torch.float32}
    assert home.dtype(block) == torch.bfloat16, "what it is stored in, while it is worked on"
    assert {p.dtype for p in other.module.parameters()} == {torch.bfloat16}
    home.leave(block)
    assert all(torch.equal(p, before[name]) for name, p in block.module.named_parameters())


def test_a_block_that_never_entered_cannot_leave():
    block, _ = find_blocks(tiny_model())
    with pytest.raises(AssertionError, match="never entered"):
        InPlace().leave(block)
