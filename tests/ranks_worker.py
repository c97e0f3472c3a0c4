"""What a process of several does in tests/optimize/test_ranks.py; a module of its own, as processes import it by name."""

import torch
from families import FAMILIES
from packed import random_packed
from transformers import AutoModelForCausalLM

from pairquant.models.planning import plan_model
from pairquant.optimize.ranks import Ranks
from pairquant.optimize.walk import Walk
from pairquant.spec.options import QuantConfig
from pairquant.spec.recipe import Recipe


def exchange(rank, size, file):
    """What each of three processes sees of a matrix of two units of rows, and of linears that the last one has."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    ranks, matrix = Ranks(rank, size), torch.arange(48.0).view(16, 3)
    mine = matrix[ranks.rows(16, 8)]
    whole = [ranks.collected(mine, 16, 8, owner) for owner in range(size)]
    assert [part is not None for part in whole] == [owner == rank for owner in range(size)]
    assert torch.equal(whole[rank], matrix)
    for bias in (False, True):
        packed = random_packed(64, 32, 32, bias=bias)
        found = ranks.shared(packed if rank == size - 1 else None, packed.layout, size - 1, torch.device("cpu"))
        assert all(torch.equal(tensor, packed.tensors[name]) for name, tensor in found.tensors.items())
    torch.distributed.destroy_process_group()


def round_experts(rank, size, file):
    """Fit experts with transforms of their own on so few tokens that some expert gets none of one process's."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    torch.manual_seed(0)
    model, ranks = AutoModelForCausalLM.from_config(FAMILIES["Mixtral"].build()).eval(), Ranks(rank, size)
    config = QuantConfig(
        group_size=32, rotations=2, activations="int4", transform_per_expert=True, recipe=Recipe(steps=2)
    )
    tokens = torch.randint(3, 200, (2, 3), generator=torch.Generator().manual_seed(2))
    plan, blocks = plan_model(model, config)
    walk = Walk(model, blocks, plan, config, torch.device("cpu"), ranks.windows(tokens), ranks=ranks)
    chosen = torch.cat([torch.unique(choices) for choices in experts_chosen(model, ranks.windows(tokens))])
    missed = torch.tensor([len(walk.blocks) * model.config.num_local_experts - len(chosen)])
    ranks.largest(missed)
    assert missed, "every expert gets tokens of every process: the test shows nothing"
    for result in walk.run():
        for path, packed in result.packed.items():
            theta = packed["theta"].clone()
            torch.distributed.broadcast(theta, 0)
            assert torch.equal(theta, packed["theta"]), path
            assert packed["scales"].isfinite().all()
    torch.distributed.destroy_process_group()


def experts_chosen(model, tokens):
    """Yield the numbers of the experts that each block's router chooses for these tokens."""
    with torch.no_grad():
        logits = model(tokens, output_router_logits=True).router_logits
    for each in logits:
        yield each.topk(model.config.num_experts_per_tok).indices
