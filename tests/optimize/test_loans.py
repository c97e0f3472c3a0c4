"""Borrowed layers while blocks come and go: as they were for the original, as they are now for the quantized model."""

import torch
from families import FAMILIES
from transformers import AutoModelForCausalLM

from pairquant.models.blocks import find_blocks
from pairquant.models.sharing import fold_shared
from pairquant.optimize.loans import Loans
from pairquant.optimize.walk import quantize_blocks
from pairquant.spec.options import QuantConfig


def zamba():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES["Zamba"].build()).eval().float()


def test_both_values_can_be_had():
    model = zamba()
    fold_shared(model)
    blocks = find_blocks(model)
    loans = Loans(blocks)
    assert [loans.lends(block) for block in blocks] == [False, True, False, False]
    weight = model.model.layers[1].shared_transf.feed_forward.down_proj.weight
    before = weight.detach().clone()
    loans.remember(blocks[1], settled=False)
    weight.data += 1
    loans.remember(blocks[1], settled=True)
    loans.put(blocks[3], settled=False)
    assert torch.equal(weight, before)
    loans.put(blocks[0], settled=True)  # borrows nothing
    assert torch.equal(weight, before)
    loans.put(blocks[3], settled=True)
    assert torch.equal(weight, before + 1)


def test_a_shared_layer_is_quantized_once_and_stays_so_to_the_end():
    model = zamba()
    tokens = torch.randint(3, 259, (3, 32), generator=torch.Generator().manual_seed(0))
    config = QuantConfig(preset="quick", bits=4, group_size=32, rotations=2)
    results = list(quantize_blocks(model, tokens, config, torch.device("cpu")))
    paths = [path for result in results for path in result.packed]
    assert len(paths) == len(set(paths))
    assert sum("shared_transf" in path for path in paths) == 7
    shared = model.model.layers[1].shared_transf.feed_forward.down_proj.weight
    (packed,) = [r.packed[p] for r in results for p in r.packed if p.endswith("1.shared_transf.feed_forward.down_proj")]
    from pairquant.core.linear import decode

    torch.testing.assert_close(shared, decode(packed))
