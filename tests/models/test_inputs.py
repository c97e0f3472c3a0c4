"""What linears read: one input for those that are handed the very same tensor."""

import torch
from torch import nn

from pairquant.models.inputs import recorded_inputs
from pairquant.models.sites import sites_in


def test_the_same_tensor_is_one_input_and_an_equal_one_is_another():
    module = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q", "k", "o")})
    sites = {site.path: site for site in sites_in(module)}
    x = torch.randn(2, 3, 4)
    with recorded_inputs(sites) as inputs:
        module["q"](x)
        module["o"](x.clone())
        module["k"](x)
    assert inputs.readers == [["q", "k"], ["o"]]
    assert [tuple(tensor.shape) for tensor in inputs.tensors] == [(6, 4), (6, 4)]


def test_nothing_is_recorded_once_the_context_is_closed():
    module = nn.Linear(4, 4)
    sites = {site.path: site for site in sites_in(module, "a")}
    with recorded_inputs(sites) as inputs:
        pass
    module(torch.randn(1, 4))
    assert inputs.readers == []
    assert not module._forward_pre_hooks
