"""Borrowed layers while blocks come and go: as they were for the original, as they are now for the quantized model."""

import pytest
import torch
from families import FAMILIES
from transformers import AutoModelForCausalLM

from pairquant.core.linear import decode
from pairquant.models.blocks import find_blocks
from pairquant.models.planning import plan_model
from pairquant.models.sharing import fold_shared
from pairquant.optimize.loans import Loans
from pairquant.optimize.walk import Walk, quantize_blocks
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
    torch.testing.assert_close(shared, decode(packed))


class Earlier:
    """What an earlier run left: the results of some blocks, and the streams that enter the next one."""

    def __init__(self, results, stored):
        self.results, self.stored, self.count = results, stored, len(results)

    def result(self, index):
        return self.results[index]

    def snapshot(self):
        return self.count, self.stored


@pytest.mark.parametrize("family", ["Zamba", "Gemma 4 (text)"])
def test_a_run_that_goes_on_gives_what_one_run_would(family):
    """After the block that lends its layers, and between blocks that hand each other keys and values."""
    tokens = torch.randint(3, 259, (3, 32), generator=torch.Generator().manual_seed(0))
    config = QuantConfig(preset="quick", bits=4, group_size=32, rotations=2)

    def run(**more):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES[family].build()).eval().float()
        fold_shared(model)
        plan, blocks = plan_model(model, config)
        return list(Walk(model, blocks, plan, config, torch.device("cpu"), tokens, **more).run())

    kept = {}
    whole = run(kept=lambda index, streams: kept.update({index: {k: v.clone() for k, v in streams.tensors().items()}}))
    rest = run(finished=Earlier(whole[:3], kept[2]))
    assert [result.index for result in rest] == [3]
    assert rest[0].packed.keys() == whole[3].packed.keys()
    assert all(
        torch.equal(tensor, whole[3].packed[path].tensors[name])
        for path, linear in rest[0].packed.items()
        for name, tensor in linear.tensors.items()
    )
