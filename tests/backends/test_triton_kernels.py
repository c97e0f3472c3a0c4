"""Our Triton kernels as a backend: stored tensors come back, three linears at most go together, products are right."""

import pytest
import torch
from packed import random_packed

pytest.importorskip("triton")

from pairquant.backends.triton_kernels import TritonKernels
from pairquant.core.linear import decode, forward

BACKEND = TritonKernels()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = (40, 8, 24)


@pytest.fixture(scope="module")
def packed():
    return [random_packed(rows, 96, 32, 2, seed).to(DEVICE) for seed, rows in enumerate(SIZES)]


def test_at_most_three_linears_go_together(packed):
    assert [len(batch) for batch in BACKEND.batches([*packed, *packed[:2]])] == [3, 2]


def test_what_it_replaces_comes_back_bit_for_bit(packed):
    tensors = BACKEND.prepare(packed, torch.float16)
    for index, linear in enumerate(packed):
        stored = BACKEND.stored(tensors, SIZES, index, linear.layout)
        assert set(stored) == set(BACKEND.replaces)
        assert all(torch.equal(tensor, linear[name]) for name, tensor in stored.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_products_and_gradients(packed, dtype):
    tensors = BACKEND.prepare(packed, dtype)
    assert BACKEND.channels(tensors, 32) == 96
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    y = BACKEND.compute(x, tensors, None, SIZES, 32).float()
    want = torch.cat([forward(p, x) for p in packed], -1)
    assert (y - want).norm() / want.norm() < 2e-3
    grad = torch.randn(3, sum(SIZES), generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    back = BACKEND.input_gradient(grad, tensors, SIZES, 32).float()
    expected = grad.float() @ torch.cat([decode(p) for p in packed])
    assert (back - expected).norm() / expected.norm() < 2e-3
