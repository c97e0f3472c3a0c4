"""PyTorch's int4 product: which linears it joins, and the weight that its packed form stands for."""

import gc

import pytest
import torch
from packed import random_packed

from pairquant.backends.cpu_int4 import CpuInt4
from pairquant.core.linear import decode, forward
from pairquant.kernels.run.cpu import CpuWeights
from pairquant.kernels.run.decoded_budget import Budget
from pairquant.spec.linear import Spec

BACKEND = CpuInt4()


def linears(shared):
    packed = [random_packed(rows, 128, 64, 2, seed, bias=seed == 0) for seed, rows in enumerate((32, 16))]
    if shared:
        packed[1] = packed[1].with_tensors(**{n: packed[0][n] for n in ("theta", "pairs", "channel_scales")})
    return packed


@pytest.mark.parametrize(("shared", "count"), [(True, 1), (False, 2)])
def test_linears_of_one_transform_are_one_matrix(shared, count):
    packed = linears(shared)
    assert len(BACKEND.batches(packed)) == 1
    assert len(CpuWeights.of(BACKEND.prepare(packed, torch.bfloat16)).matrix) == count


def test_rows_that_fill_no_pack_are_left_to_another_backend():
    packed = [random_packed(rows, 128, 64, 2, seed) for seed, rows in enumerate((24, 8))]
    assert len(BACKEND.batches(packed)) == 2
    assert any(BACKEND.refusal(part.layout, torch.device("cpu"), torch.bfloat16) for part in packed)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tokens", [3, 40])
def test_outputs_of_linears_that_run_at_once_stand_side_by_side(shared, tokens):
    packed = linears(shared)
    tensors = BACKEND.prepare(packed, torch.bfloat16)
    assert BACKEND.channels(tensors, 64) == 128
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    bias = torch.cat([packed[0].bias, torch.zeros(16)]).bfloat16()
    y = BACKEND.compute(x, tensors, bias, [32, 16], 64).float()
    want = torch.cat([forward(p, x) for p in packed], -1)
    assert (y - want).norm() / want.norm() < 2e-2


@pytest.mark.parametrize("shared", [True, False])
def test_the_gradient_of_linears_that_run_at_once_is_the_sum_of_theirs(shared):
    packed = linears(shared)
    grad = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = BACKEND.input_gradient(grad, BACKEND.prepare(packed, torch.bfloat16), [32, 16], 64).float()
    want = sum(part.float() @ decode(p) for part, p in zip(grad.split([32, 16], -1), packed, strict=True))
    assert (got - want).norm() / want.norm() < 1e-2


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


@pytest.fixture
def limit(monkeypatch):
    """A budget of this process for decoded weights, of a CPU that multiplies bfloat16."""
    found = Budget(2 * 128 * 48)
    monkeypatch.setattr("pairquant.backends.cpu_int4.budget", lambda device: found)
    monkeypatch.setattr("pairquant.kernels.run.cpu.multiplies_bfloat16", lambda: True)
    return found


@pytest.mark.parametrize("shared", [True, False])
def test_decoded_weights_are_kept_within_the_budget_and_multiply_x_itself(limit, shared):
    packed = linears(shared)
    kept, not_kept = (BACKEND.prepare(packed, torch.bfloat16) for _ in range(2))
    assert limit.taken == limit.limit
    assert all(len(codes.dense) for codes in CpuWeights.of(kept).codes)
    assert not any(len(codes.dense) for codes in CpuWeights.of(not_kept).codes)
    assert sum(len(codes.rows) for codes in CpuWeights.of(kept).codes) == 0, "nothing is kept twice"
    x = torch.randn(20, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    dense = torch.cat([decode(part).bfloat16() for part in packed])
    assert torch.equal(BACKEND.compute(x, kept, None, [32, 16], 64), torch.nn.functional.linear(x, dense))
    few = x[:3]
    assert torch.equal(
        BACKEND.compute(few, kept, None, [32, 16], 64), BACKEND.compute(few, not_kept, None, [32, 16], 64)
    )
    del kept
    gc.collect()
    assert limit.taken == 0
    assert len(CpuWeights.of(BACKEND.prepare(packed, torch.bfloat16)).codes[0].dense)


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_preparation_that_fails_gives_back_what_it_took(limit, monkeypatch, fails_at):
    done = []

    def fail(run, keep):
        if len(done) == fails_at:
            raise RuntimeError("no memory")
        done.append(prepared(run, keep))
        return done[-1]

    prepared = CpuInt4._prepared
    monkeypatch.setattr(CpuInt4, "_prepared", staticmethod(fail))
    with pytest.raises(RuntimeError, match="no memory"):
        BACKEND.prepare(linears(False), torch.bfloat16)
    done.clear()
    gc.collect()
    assert limit.taken == 0


def test_no_decoded_weights_are_kept_where_they_would_be_slower(limit, monkeypatch):
    monkeypatch.setattr("pairquant.kernels.run.cpu.multiplies_bfloat16", lambda: False)
    assert len(CpuWeights.of(BACKEND.prepare(linears(True), torch.bfloat16)).codes[0].dense) == 0
    assert limit.taken == 0
