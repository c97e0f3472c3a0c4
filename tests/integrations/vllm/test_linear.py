"""How packed weights come into vLLM's layers; what is common to engines: ../test_packed_layers.py."""

import pytest
import torch

from pairquant.spec.linear import Spec
from pairquant.support.errors import ConfigError

pytest.importorskip("vllm", reason="needs vLLM")


def test_tensor_parallelism_that_would_split_a_group_is_refused():
    from pairquant.integrations.vllm.linear import PairQuantLinearMethod

    method = PairQuantLinearMethod(Spec(4, 64, 2), "a.down_proj")
    with pytest.raises(ConfigError, match=r"a.down_proj \(192 → 128\).*in_features 96.*tensor-parallel-size"):
        method.create_weights(torch.nn.Module(), 96, [128], 192, 128, torch.bfloat16, weight_loader=None)
