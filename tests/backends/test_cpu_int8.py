"""The backend of int8 activations on CPUs: what it takes, and what it gives."""

import warnings

import pytest
import torch
from packed import check_rounded, error, random_packed, with_uneven_groups

from pairquant.backends.cpu_int8 import CpuInt8
from pairquant.backends.ops import run
from pairquant.backends.table import explain, prepare_all
from pairquant.core.linear import decode, forward
from pairquant.kernels.run import cpu_int8
from pairquant.kernels.run.cpu_int8 import products_are_exact
from pairquant.layers.linear import RotatedLinear
from pairquant.layers.model import link_siblings
from pairquant.spec.linear import Spec

BACKEND, CPU = CpuInt8(), torch.device("cpu")
needs_exact_products = pytest.mark.skipif(
    not products_are_exact(), reason="PyTorch's int8 products overflow on this CPU"
)


def siblings(sizes, shared=True):
    """Two linears that read the same input."""
    packed = [random_packed(rows, 128, 64, 2, seed, activations="int8") for seed, rows in enumerate(sizes)]
    if shared:
        packed[1] = packed[1].with_tensors(**{n: packed[0][n] for n in ("theta", "pairs", "channel_scales")})
    return packed


@pytest.fixture
def exact(monkeypatch):
    """A CPU whose products of int8 numbers are right."""
    monkeypatch.setattr(cpu_int8, "products_are_exact", lambda: True)


@pytest.mark.parametrize(
    ("spec", "dtype", "said"),
    [
        (Spec(4, 64, 2, activations="int8"), torch.bfloat16, None),
        (Spec(4, 64, 2), torch.bfloat16, "multiplies int8 activations, the layer's are not rounded"),
        (Spec(4, 64, 2, activations="fp8"), torch.bfloat16, "multiplies int8 activations, the layer's are fp8"),
        (Spec(3, 64, 2, activations="int8"), torch.bfloat16, "multiplies 4-bit weights"),
        (Spec(4, 64, 2, activations="int8"), torch.float32, "bfloat16 only"),
    ],
)
def test_4_bits_with_int8_activations_are_taken(spec, dtype, said, exact):
    reason = BACKEND.refusal(spec.layout(128, 64), CPU, dtype)
    assert reason is None if said is None else said in reason
    assert (explain(spec.layout(128, 64), CPU, dtype).backend == "cpu-int8") == (said is None)


def test_it_is_no_simulation(exact):
    assert explain(Spec(4, 64, 2, activations="int8").layout(128, 64), CPU, torch.bfloat16).label == "cpu-int8"


def test_a_cpu_whose_products_overflow_is_refused(monkeypatch):
    monkeypatch.setattr(cpu_int8, "products_are_exact", lambda: False)
    explained = explain(Spec(4, 64, 2, activations="int8").layout(128, 64), CPU, torch.bfloat16)
    assert "VNNI or AMX" in explained.refusals["cpu-int8"]
    assert explained.label == "cpu-int4 (int8 activations simulated)"


@pytest.mark.parametrize(("sizes", "count"), [((64, 24), 2), ((40, 24), 1), ((64, 32), 1)])
def test_rows_that_fill_no_pack_are_not_joined(sizes, count):
    packed = siblings(sizes)
    assert len(BACKEND.batches(packed)) == count


@pytest.mark.parametrize("sizes", [(64, 24), (40, 24)])
def test_layers_of_one_input_run_whatever_rows_they_have(sizes, generator):
    model = torch.nn.Module()
    packed = siblings(sizes)
    model.gate_proj, model.up_proj = map(RotatedLinear.from_packed, packed)
    link_siblings(model)
    x = torch.randn(20, 128, generator=generator).bfloat16()
    for layer, linear in zip((model.gate_proj, model.up_proj), packed, strict=True):
        assert error(layer(x), forward(linear, x)) < 1e-2


@pytest.mark.parametrize("biased", [0, 1])
def test_some_of_the_linears_may_have_a_bias(biased):
    packed = siblings((32, 16))
    plain = BACKEND.prepare(packed, torch.bfloat16)
    packed[biased] = random_packed(
        packed[biased].layout.out_features, 128, 64, 2, bias=True, activations="int8"
    ).with_tensors(**packed[biased].tensors)
    for one, other in zip(BACKEND.prepare(packed, torch.bfloat16), plain, strict=True):
        assert torch.equal(one, other)


@needs_exact_products
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tokens", [3, 20])
def test_linears_that_read_one_input(shared, tokens, generator):
    packed = siblings((32, 16), shared)
    made = prepare_all(packed, torch.bfloat16)
    assert [one.backend for one in made] == ["cpu-int8"] * (1 if shared else 2)
    x = torch.randn(tokens, 128, generator=generator).bfloat16()
    parts = [run(BACKEND, x, one.tensors, None, one.out_features, 64, one.activations) for one in made]
    check_rounded(torch.cat(parts, -1), packed, x, 1e-2)


def test_a_layer_of_uneven_groups_is_prepared_with_a_warning():
    packed = random_packed(32, 128, 64, activations="int8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BACKEND.prepare([packed], torch.bfloat16)
    with pytest.warns(UserWarning, match="cpu-int8: the scales of a layer's groups differ so much"):
        BACKEND.prepare([with_uneven_groups(packed)], torch.bfloat16)


def test_the_gradient_passes_as_if_nothing_were_rounded(generator):
    packed = random_packed(32, 64, 32, 3, activations="int8")
    x = torch.randn(20, 64, generator=generator).bfloat16().requires_grad_()
    grad = torch.randn(20, 32, generator=generator).bfloat16()
    run(BACKEND, x, BACKEND.prepare([packed], torch.bfloat16), None, [32], 32, "int8").backward(grad)
    assert error(x.grad, grad.float() @ decode(packed)) < 1e-2


def test_pytorch_finds_no_fault_with_the_preparation():
    packed = random_packed(32, 64, 32, activations="int8")
    stored = [packed[name] for name in packed.layout.fields()]
    torch.library.opcheck(torch.ops.pairquant.cpu_int8_weights, (stored, packed.layout.numbers()))
