"""The quantized layers of a model: which are linked, found, and put in place."""

import torch
from packed import random_packed
from torch import nn

from pairquant.layers.linear import RotatedLinear
from pairquant.layers.model import link_siblings, replace_module, rotated_linears, unlike_siblings
from pairquant.spec.linear import Spec


def attention(*specs):
    module = nn.Module()
    for i, (name, (rows, group, rotations)) in enumerate(zip(("q_proj", "k_proj", "v_proj"), specs, strict=True)):
        setattr(module, name, RotatedLinear.from_packed(random_packed(rows, 128, group, rotations, i)))
    return module


def test_siblings_of_one_spec_are_linked_and_run_as_before():
    module = attention((32, 64, 2), (16, 64, 2), (16, 64, 2))
    x = torch.randn(2, 128)
    before = [layer(x) for _, layer in rotated_linears(module)]
    link_siblings(module)
    assert len({id(layer._merged) for _, layer in rotated_linears(module)}) == 1
    assert all(torch.equal(layer(x), y) for (_, layer), y in zip(rotated_linears(module), before, strict=True))


def test_siblings_that_differ_are_not_linked():
    module = attention((32, 64, 2), (16, 64, 2), (16, 32, 2))
    link_siblings(module)
    assert len({id(layer._merged) for _, layer in rotated_linears(module)}) == 3


def test_groups_that_differ_are_named():
    four, eight = Spec(4, 64, 8), Spec(8, 64, 8)
    specs = {
        "a.q_proj": four,
        "a.k_proj": four,
        "a.v_proj": eight,
        "b.gate_proj": four,
        "b.up_proj": four,
        "b.gate": eight,
    }
    assert unlike_siblings(specs) == [("a.q_proj", "a.k_proj", "a.v_proj")]
    assert unlike_siblings({"a.q_proj": four, "a.v_proj": four}) == []


def test_a_module_is_put_at_its_path():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    replace_module(model, "0.0", nn.Identity())
    assert isinstance(model[0][0], nn.Identity)
