"""What a process of several does in tests/optimize/test_ranks.py; a module of its own, as processes import it by name."""

import torch
from packed import random_packed

from pairquant.optimize.ranks import Ranks


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
