"""How packed weights come into the layers of serving engines, and run there: what engines have in common."""

import pytest
import torch
from packed import random_packed

from pairquant.core.linear import forward
from pairquant.integrations.packed_layers import PackedLinearMethod, Pending
from pairquant.spec.linear import Spec
from pairquant.support.errors import CheckpointError


class Method(PackedLinearMethod):
    """Of an engine whose tensors come whole, each for one of the merged linears."""

    def rank_of(self, layer):
        return layer.rank

    def by_rows(self, layer, name, stored, extra):
        widths = [layout.fields()[name].shape[1] for layout in layer.pairquant.layouts]
        parameter = torch.nn.Parameter(torch.empty(stored.shape, dtype=stored.dtype), requires_grad=False)

        def place(parameter, loaded, shard=0):
            parameter.data.narrow(1, sum(widths[:shard]), widths[shard]).copy_(loaded)

        parameter.weight_loader = layer.pairquant.counting(name, place)
        return parameter


def loaded(method, sizes, linears, without=None):
    """A layer into which the tensors of these linears have come, but for one, by name and place."""
    layer, channels = torch.nn.Module(), linears[0].layout.in_features
    layer.rank = 0
    method.create_weights(layer, channels, sizes, channels, sum(sizes), torch.float32)
    for place, packed in enumerate(linears):
        for name in packed.layout.fields():
            if (name, place) != without:
                parameter = getattr(layer, name)
                parameter.weight_loader(parameter, packed[name], place)
    method.process_weights_after_loading(layer)
    return layer


def test_merged_linears_answer_as_the_reference_does():
    linears = [random_packed(rows, 64, 32, 2, seed=rows) for rows in (48, 16, 16)]
    method = Method(Spec(4, 32, 2), "a.qkv_proj")
    layer = loaded(method, [48, 16, 16], linears)
    x, bias = torch.randn(5, 64), torch.randn(80)
    expected = torch.cat([forward(packed, x) for packed in linears], -1) + bias
    torch.testing.assert_close(method.apply(layer, x, bias), expected, rtol=1e-4, atol=1e-5)
    assert not dict(layer.named_parameters()), "the stored tensors go"
    method.process_weights_after_loading(layer)  # a second call, as engines make, finds nothing to do
    torch.testing.assert_close(method.apply(layer, x, bias), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("missing", ["qweight", "theta"])
def test_a_tensor_that_has_not_come_is_named(missing):
    linears = [random_packed(16, 64, 32, 2, seed=seed) for seed in range(2)]
    with pytest.raises(CheckpointError, match=f"a.gate_up_proj.{missing} is missing for 1 of 2 linears"):
        loaded(Method(Spec(4, 32, 2), "a.gate_up_proj"), [16, 16], linears, without=(missing, 1))


def test_a_tensor_of_another_dtype_is_refused():
    linears = [random_packed(16, 64, 32, 2)]
    wide = linears[0].with_tensors(scales=linears[0]["scales"].float())
    with pytest.raises(CheckpointError, match=r"a.o_proj.scales is torch.float32, must be torch.float16"):
        loaded(Method(Spec(4, 32, 2), "a.o_proj"), [16], [wide])


@pytest.mark.parametrize("channels", [16, 48, 64])
def test_a_transform_of_another_width_is_refused(channels):
    layout = Spec(4, 32, 2).layout(64, 8)
    loader = Pending("a.o_proj", [layout], torch.bfloat16, input_size=64).transform_loader("theta", lambda: 0)
    parameter = torch.nn.Parameter(torch.empty(1, 2, 32, dtype=torch.float16), requires_grad=False)
    with pytest.raises(CheckpointError, match=r"a.o_proj.theta has shape \[2, \d+\], must be \[2, 32\]"):
        loader(parameter, torch.zeros(2, channels, dtype=torch.float16))


def test_each_rank_takes_its_channels_of_a_transform():
    layout = Spec(4, 32, 2).layout(32, 8)
    loader = Pending("a.o_proj", [layout], torch.bfloat16, input_size=64).transform_loader("theta", lambda: 1)
    parameter = torch.nn.Parameter(torch.empty(1, 2, 16, dtype=torch.float16), requires_grad=False)
    theta = torch.randn(2, 32).half()
    loader(parameter, theta)
    assert torch.equal(parameter[0], theta[:, 16:])
