"""The RMSNorm of a sum in plain PyTorch, which backends without a kernel for it use."""

import pytest
import torch
import torch.nn.functional as F
from packed import error

from pairquant.kernels.run.norm import Norm


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kept_as", [torch.bfloat16, torch.float32], ids=str)
def test_it_is_pytorchs_norm_of_the_sum(dtype, kept_as, generator):
    x, residual = torch.randn(2, 3, 5, 96, generator=generator).to(dtype)
    norm = Norm(torch.rand(96, generator=generator).to(kept_as), 1e-2)
    normed, h = norm.of_sum(x, residual)
    total = x.double() + residual.double()
    assert (normed.dtype, h.dtype) == (dtype, dtype)
    assert torch.equal(h, (x.float() + residual.float()).to(dtype))
    bound = 1e-5 if dtype == kept_as == torch.float32 else 1e-2
    assert error(normed, F.rms_norm(total, (96,), norm.weight.double(), norm.eps)) < bound


def test_the_result_for_known_numbers():
    """The sums are 3 and 4, whose mean square is 12.5; eps makes it 16."""
    normed, h = Norm(torch.tensor([2.0, 1.0]), 3.5).of_sum(torch.tensor([[1.0, 5.0]]), torch.tensor([[2.0, -1.0]]))
    assert h.tolist() == [[3, 4]]
    assert normed.tolist() == [[1.5, 1]]
