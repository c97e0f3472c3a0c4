"""How packed weights come into vLLM's layers."""

import pytest
import torch

from pairquant.spec.linear import Spec
from pairquant.support.errors import CheckpointError, ConfigError

pytest.importorskip("vllm", reason="needs vLLM")


@pytest.mark.parametrize("channels", [16, 48, 64])
def test_a_transform_of_another_width_is_refused(channels):
    from pairquant.integrations.vllm.linear import Pending

    layer, layout = torch.nn.Module(), Spec(4, 32, 2).layout(64, 8)
    loader = Pending("a.o_proj", [layout], torch.bfloat16, input_size=64).transform_loader("theta", layer)
    parameter = torch.nn.Parameter(torch.empty(1, 2, 32, dtype=torch.float16), requires_grad=False)
    with pytest.raises(CheckpointError, match=r"a.o_proj.theta has shape \[2, \d+\], must be \[2, 32\]"):
        loader(parameter, torch.zeros(2, channels, dtype=torch.float16))


def test_each_rank_takes_its_channels_of_a_transform():
    from pairquant.integrations.vllm.linear import Pending

    layer, layout = torch.nn.Module(), Spec(4, 32, 2).layout(32, 8)
    layer.tp_rank = 1
    loader = Pending("a.o_proj", [layout], torch.bfloat16, input_size=64).transform_loader("theta", layer)
    parameter = torch.nn.Parameter(torch.empty(1, 2, 16, dtype=torch.float16), requires_grad=False)
    theta = torch.randn(2, 32).half()
    loader(parameter, theta)
    assert torch.equal(parameter[0], theta[:, 16:])


def test_tensor_parallelism_that_would_split_a_group_is_refused():
    from pairquant.integrations.vllm.linear import PairQuantLinearMethod

    method = PairQuantLinearMethod(Spec(4, 64, 2), "a.down_proj")
    with pytest.raises(ConfigError, match=r"a.down_proj \(192 → 128\).*in_features 96.*tensor-parallel-size"):
        method.create_weights(torch.nn.Module(), 96, [128], 192, 128, torch.bfloat16, weight_loader=None)
