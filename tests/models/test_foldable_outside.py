"""What lies outside the blocks: when the stream can be rotated there, why not, and what folding rewrites."""

import torch
from families import random_model
from torch import nn

from pairquant.core.rotation import rotate_dense
from pairquant.models.blocks import find_blocks
from pairquant.models.foldable_outside import look_outside
from pairquant.models.folding import Transforms

GROUP = 32


def found_outside(model, group=GROUP):
    return look_outside(model, find_blocks(model), model.config.hidden_size, group, torch.device("cpu"))


def test_a_stream_that_groups_do_not_divide_is_not_rotated():
    found = found_outside(random_model("LLaMA 2, 3"), group=48)
    assert found.reason == "64 hidden channels are no multiple of the group size 48"


def test_a_parameter_of_unknown_use_outside_the_blocks_forbids_it():
    model = random_model("LLaMA 2, 3")
    model.model.extra = nn.Linear(64, 64, bias=False)
    assert found_outside(model).reason == "model.extra.weight, outside the blocks, may read or write the stream"


@torch.no_grad()
def test_what_is_outside_is_rotated_with_the_blocks_left_alone():
    model = random_model("Granite")
    outside = found_outside(model)
    rotation = torch.linalg.qr(torch.randn(2, GROUP, GROUP))[0]
    before = model.get_input_embeddings().weight.clone()
    outside.fold(Transforms(rotation))
    assert torch.allclose(model.get_input_embeddings().weight, rotate_dense(before, rotation), atol=1e-6)
    assert torch.equal(model.model.norm.weight, torch.ones(64))
