"""PyTorch's int4 product: which linears it joins, and the weight that its packed form stands for."""

import pytest
import torch
from packed import random_packed

from pairquant.backends.cpu_int4 import CpuInt4
from pairquant.core.linear import decode, forward
from pairquant.spec.linear import Spec

BACKEND = CpuInt4()


def linears(shared):
    packed = [random_packed(rows, 128, 64, 2, seed, bias=seed == 0) for seed, rows in enumerate((32, 16))]
    if shared:
        packed[1] = packed[1].with_tensors(**{n: packed[0][n] for n in ("theta", "pairs", "channel_scales")})
    return packed


@pytest.mark.parametrize(("shared", "count"), [(True, 1), (False, 2)])
def test_linears_of_one_transform_are_one_matrix(shared, count):
    assert len(BACKEND.batches(linears(shared))) == count


def test_a_joined_matrix_gives_both_outputs():
    packed = [part.with_tensors() for part in linears(True)]
    packed[0] = random_packed(32, 128, 64, 2, 0)
    packed[1] = packed[1].with_tensors(**{n: packed[0][n] for n in ("theta", "pairs", "channel_scales")})
    tensors = BACKEND.prepare(packed, torch.bfloat16)
    assert BACKEND.channels(tensors, 64) == 128
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = BACKEND.compute(x, tensors, None, [32, 16], 64).float()
    want = torch.cat([forward(p, x) for p in packed], -1)
    assert (y - want).norm() / want.norm() < 2e-2


def test_the_gradient_goes_through_the_decoded_weight():
    packed = random_packed(32, 64, 32, 3)
    grad = torch.randn(5, 32).bfloat16()
    got = BACKEND.input_gradient(grad, BACKEND.prepare([packed], torch.bfloat16), [32], 32).float()
    want = grad.float() @ decode(packed)
    assert (got - want).norm() / want.norm() < 1e-2


def test_a_bias_is_no_part_of_what_is_prepared():
    with_bias, without = random_packed(32, 64, 32, bias=True), random_packed(32, 64, 32)
    for one, other in zip(*(BACKEND.prepare([p], torch.bfloat16) for p in (with_bias, without)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("spec", "rows", "dtype", "said"),
    [
        (Spec(4, 64, 2), 64, torch.bfloat16, None),
        (Spec(4, 64, 2), 48, torch.bfloat16, None),
        (Spec(4, 64, 2), 40, torch.bfloat16, "packs 16 rows"),
        (Spec(3, 64, 2), 32, torch.bfloat16, "multiplies 4-bit weights"),
        (Spec(4, 64, 2), 64, torch.float16, "bfloat16 only"),
        (Spec(4, 64, 2), 64, torch.float32, "bfloat16 only"),
    ],
)
def test_4_bits_whole_packs_of_rows_and_bfloat16_are_taken(spec, rows, dtype, said):
    reason = BACKEND.refusal(spec.layout(128, rows), torch.device("cpu"), dtype)
    assert reason is None if said is None else said in reason


def test_a_pytorch_without_the_product_is_not_asked_for_it(monkeypatch):
    monkeypatch.setattr("pairquant.backends.cpu_int4.torch.ops", type("Ops", (), {"aten": object()}))
    reason = BACKEND.refusal(Spec(4, 64, 2).layout(128, 64), torch.device("cpu"), torch.bfloat16)
    assert "does not have" in reason
