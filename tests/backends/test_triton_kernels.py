"""Our Triton kernels as a backend: stored tensors come back, three linears at most go together, products are right."""

import gc
from contextlib import nullcontext

import pytest
import torch
from packed import check_rounded, error, random_packed, with_uneven_groups

pytest.importorskip("triton")

from pairquant.backends.base import Backend
from pairquant.backends.experts import explain_experts
from pairquant.backends.ops import run
from pairquant.backends.triton_experts import TritonExperts
from pairquant.backends.triton_kernels import TritonKernels
from pairquant.core.linear import decode, forward
from pairquant.kernels.run.decoded_budget import Budget
from pairquant.kernels.run.norm import Norm
from pairquant.kernels.run.table import DECODED_FROM
from pairquant.kernels.run.weights import KernelWeights
from pairquant.spec.activations import FORMATS
from pairquant.spec.linear import Spec

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


@pytest.fixture
def limit(monkeypatch):
    """A budget of this process for the decoded weights of `packed`, once."""
    found = Budget(2 * 96 * sum(SIZES))
    monkeypatch.setattr("pairquant.backends.triton_kernels.budget", lambda device: found)
    return found


def test_decoded_weights_are_kept_within_the_budget_and_multiply_x_itself(packed, limit):
    kept, not_kept = (BACKEND.prepare(packed, torch.float16) for _ in range(2))
    assert limit.taken == limit.limit
    dense = KernelWeights.of_tensors(kept, SIZES, 32).decoded
    assert KernelWeights.of_tensors(not_kept, SIZES, 32).decoded is None
    assert (dense.float() - torch.cat([decode(p) for p in packed])).norm() < 1e-3 * dense.float().norm()
    x = torch.randn(DECODED_FROM, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE).half()
    bias = torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(1)).to(DEVICE).half()
    want = torch.nn.functional.linear(x, dense, bias)
    assert torch.equal(BACKEND.compute(x, kept, bias, SIZES, 32), want)
    few = x[:3]
    assert torch.equal(BACKEND.compute(few, kept, bias, SIZES, 32), BACKEND.compute(few, not_kept, bias, SIZES, 32))
    assert torch.equal(BACKEND.input_gradient(want, kept, SIZES, 32), want @ dense)
    assert BACKEND.stored(kept, SIZES, 1, packed[1].layout)["qweight"].equal(packed[1]["qweight"])
    del kept, dense
    gc.collect()
    assert limit.taken == 0


@pytest.mark.parametrize(("activations", "dtype"), [("int8", torch.float16), (None, torch.float32)])
def test_decoded_weights_are_not_kept_where_they_would_not_multiply(activations, dtype, limit):
    packed = [random_packed(40, 96, 32, 2, 0, activations=activations).to(DEVICE)]
    BACKEND.prepare(packed, dtype)
    assert limit.taken == 0


def test_a_decoding_that_fails_gives_back_what_it_took(packed, limit, monkeypatch):
    def fail(weights, dtype):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("pairquant.kernels.run.launch.decode", fail)
    with pytest.raises(torch.OutOfMemoryError):
        BACKEND.prepare(packed, torch.float16)
    assert limit.taken == 0


@pytest.mark.parametrize("activations", [None, "int8", "mxfp4"])
def test_weights_in_mxfp4(activations):
    packed = [
        random_packed(rows, 192, 64, 2, seed, activations=activations, weights="mxfp4").to(DEVICE)
        for seed, rows in enumerate(SIZES)
    ]
    tensors = BACKEND.prepare(packed, torch.bfloat16)
    assert BACKEND.simulates(packed[0].layout, DEVICE) == (activations is not None)
    for index, linear in enumerate(packed):
        stored = BACKEND.stored(tensors, SIZES, index, linear.layout)
        assert set(stored) == {"qweight", "scales"}
        assert all(torch.equal(tensor, linear[name]) for name, tensor in stored.items())
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    y = BACKEND.compute(x, tensors, None, SIZES, 64, activations)
    if activations is None:
        want = torch.cat([forward(p, x) for p in packed], -1)
        assert (y - want).norm() / want.norm() < 2e-2
    else:
        check_rounded(y, packed, x, 3e-2)
    grad = torch.randn(3, sum(SIZES), generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    expected = grad.float() @ torch.cat([decode(p) for p in packed])
    assert error(BACKEND.input_gradient(grad, tensors, SIZES, 64), expected) < 2e-2


@pytest.mark.parametrize("activations", FORMATS)
@pytest.mark.parametrize(("tokens", "dtype"), [(2, torch.float16), (20, torch.float16), (3, torch.float32)])
def test_rounded_activations(activations, tokens, dtype):
    packed = [
        random_packed(rows, 96, 32, 2, seed, activations=activations).to(DEVICE) for seed, rows in enumerate(SIZES)
    ]
    if BACKEND.refusal(packed[0].layout, torch.device("cuda"), dtype):
        pytest.skip("refused, see below")
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype).requires_grad_()
    y = run(BACKEND, x, BACKEND.prepare(packed, dtype), None, SIZES, 32, activations)
    check_rounded(y.detach(), packed, x.detach(), 2e-2)  # numbers between two codes may be rounded to the other one
    grad = torch.randn(tokens, sum(SIZES), generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    y.backward(grad)
    expected = grad.float() @ torch.cat([decode(p) for p in packed])
    assert (x.grad.float() - expected).norm() / expected.norm() < 2e-3


@pytest.mark.parametrize("uneven", [0, 1, None])
@pytest.mark.parametrize("activations", ["int8", "fp8"])
def test_weights_have_scales_of_rows_only_where_these_suffice(activations, uneven):
    packed = [random_packed(rows, 128, 64, 2, seed, activations=activations) for seed, rows in enumerate((40, 8))]
    if uneven is not None:
        packed[uneven] = with_uneven_groups(packed[uneven])
    packed = [linear.to(DEVICE) for linear in packed]
    refused = activations == "int8" and uneven is not None  # the steps of fp8 shrink with the weight
    told = pytest.warns(UserWarning, match="triton: the scales of a layer's groups") if refused else nullcontext()
    with told:
        tensors = BACKEND.prepare(packed, torch.float16)
    assert (KernelWeights.of_tensors(tensors, (40, 8), 64).row_scales is None) == refused
    x = torch.randn(20, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    check_rounded(BACKEND.compute(x, tensors, None, (40, 8), 64, activations), packed, x, 2e-2)


@pytest.mark.parametrize(
    ("spec", "dtype", "said", "simulated"),
    [
        (Spec(4, activations="int8"), torch.float32, None, False),
        (Spec(2, activations="fp8"), torch.bfloat16, None, False),
        (Spec(5, activations="int8"), torch.bfloat16, None, True),
        (Spec(5, activations="int8"), torch.float32, "multiplies int8 activations and 5-bit weights in 16 bits", True),
        (Spec(4, activations="mxfp4"), torch.float16, None, True),
        (Spec(4, activations="int8", weights="mxfp4"), torch.float16, None, True),
        (Spec(4, weights="mxfp4"), torch.float32, None, False),
        (Spec(4, activations="int4"), torch.float32, "multiplies int4 activations and 4-bit weights in 16 bits", True),
    ],
)
def test_which_activations_are_taken_and_which_only_simulated(spec, dtype, said, simulated, monkeypatch):
    monkeypatch.setattr("pairquant.backends.triton_kernels.has_float8", lambda device: True)
    layout = spec.layout(128, 64)
    reason = BACKEND.refusal(layout, torch.device("cuda"), dtype)
    assert reason is None if said is None else said in reason
    assert BACKEND.simulates(layout, torch.device("cuda")) == simulated


def test_fp8_needs_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr("pairquant.backends.triton_kernels.has_float8", lambda device: False)
    reason = BACKEND.refusal(Spec(4, activations="fp8").layout(128, 64), torch.device("cuda"), torch.float16)
    assert "compute capability 8.9" in reason
    assert BACKEND.refusal(Spec(4, activations="int8").layout(128, 64), torch.device("cuda"), torch.float16) is None


@pytest.mark.parametrize(("tokens", "dtype"), [(3, torch.bfloat16), (20, torch.bfloat16), (3, torch.float32)], ids=str)
def test_what_comes_before_is_computed_as_by_any_backend(packed, tokens, dtype):
    """Also in float32, for which there is no kernel."""
    tensors = BACKEND.prepare(packed, dtype)
    generator = torch.Generator().manual_seed(2)
    x, residual = torch.randn(2, tokens, 96, generator=generator).to(DEVICE, dtype)
    norm = torch.rand(96, generator=generator).to(DEVICE, dtype)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    y, h = BACKEND.compute_after_norm(x, residual, Norm(norm, 1e-5), tensors, None, SIZES, 32)
    want, total = Backend.compute_after_norm(BACKEND, x, residual, Norm(norm, 1e-5), tensors, None, SIZES, 32)
    assert error(y, want) < bound
    assert error(h, total) < bound
    given = torch.cat([x, residual], -1)
    want = Backend.compute_after_silu(BACKEND, given, tensors, None, SIZES, 32)
    assert error(BACKEND.compute_after_silu(given, tensors, None, SIZES, 32), want) < bound


@pytest.mark.parametrize(
    ("before", "dtype", "activations", "faster"),
    [
        ("norm", torch.bfloat16, None, True),
        ("norm", torch.float16, None, False),
        ("silu", torch.float16, None, True),
        ("silu", torch.float32, None, False),
        ("silu", torch.bfloat16, "int8", False),
    ],
)
def test_for_which_layers_it_pays_to_compute_what_comes_before(before, dtype, activations, faster):
    layout = Spec(4, 32, 2, activations=activations).layout(96, 40)
    assert BACKEND.fuses(before, layout, dtype) == faster


def test_experts_round_activations_as_other_layers_do(monkeypatch):
    monkeypatch.setattr("pairquant.backends.triton_kernels.has_float8", lambda device: False)
    int8, fp8 = (Spec(4, activations=name).layout(128, 64) for name in ("int8", "fp8"))
    cuda = torch.device("cuda")
    assert TritonExperts.refusal(int8, cuda, torch.float16) is None
    assert (
        TritonExperts.refusal(int8, cuda, torch.float32) == "multiplies experts in 16 bits, the activations are float32"
    )
    assert "compute capability 8.9" in TritonExperts.refusal(fp8, cuda, torch.float16)
    assert explain_experts([int8], cuda, torch.float16).label == "triton (int8 activations simulated)"


def test_what_comes_before_multiplies_kept_decoded_weights_too(packed, limit):
    tensors = BACKEND.prepare(packed, torch.bfloat16)
    dense = KernelWeights.of_tensors(tensors, SIZES, 32).decoded
    generator = torch.Generator().manual_seed(3)
    x, residual = torch.randn(2, DECODED_FROM, 96, generator=generator).to(DEVICE, torch.bfloat16)
    norm = torch.rand(96, generator=generator).to(DEVICE, torch.bfloat16)
    y, h = BACKEND.compute_after_norm(x, residual, Norm(norm, 1e-5), tensors, None, SIZES, 32)
    normed = torch.nn.functional.rms_norm((x + residual).float(), (96,), norm.float(), 1e-5)
    assert error(h, x + residual) < 1e-2
    assert error(y, normed @ dense.float().T) < 1e-2
    given = torch.cat([x, residual], -1)
    want = (torch.nn.functional.silu(x.float()) * residual.float()) @ dense.float().T
    assert error(BACKEND.compute_after_silu(given, tensors, None, SIZES, 32), want) < 1e-2
