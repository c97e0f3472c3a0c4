"""Decoded layers, with and without rounding of their activations, against the reference."""

import pytest
import torch
from packed import check_rounded, error, random_packed

from pairquant.backends.cpu_int4 import CpuInt4
from pairquant.backends.ops import run
from pairquant.backends.table import BY_NAME, DENSE, choose, explain, prepare_all
from pairquant.core.linear import decode, forward
from pairquant.kernels.run.cpu_int8 import products_are_exact
from pairquant.spec.activations import FORMATS

CPU = torch.device("cpu")


@pytest.mark.parametrize("activations", FORMATS)
@pytest.mark.parametrize(
    ("rows", "channels", "group", "rotations"), [(48, 192, 64, 8), (32, 96, 32, 0), (64, 128, 128, 1)]
)
def test_activations_are_rounded_as_by_the_reference(activations, rows, channels, group, rotations):
    packed = random_packed(rows, channels, group, rotations, bias=True, activations=activations)
    x = torch.randn(2, 5, channels)
    found = run(DENSE, x, DENSE.prepare([packed], x.dtype), packed.bias, [rows], group, activations)
    # A value in the middle between two steps may go either way: sums of float32 differ in their order.
    assert error(found, forward(packed, x)) < (3e-2 if activations in ("int4", "mxfp4") else 3e-3)
    plain = random_packed(rows, channels, group, rotations, bias=True)
    assert error(found, forward(plain, x)) > 1e-3


@pytest.mark.parametrize("activations", [None, *FORMATS])
def test_linears_with_transforms_of_their_own_run_at_once(activations):
    linears = [random_packed(n, 128, 64, seed=n, bits=5, activations=activations) for n in (32, 64)]
    (made,) = prepare_all(linears, torch.float32)
    assert (made.backend, made.activations) == (DENSE.name, activations)
    x = torch.randn(7, 128)
    found = run(BY_NAME[made.backend], x, made.tensors, None, made.out_features, made.group_size, made.activations)
    for part, linear in zip(found.split([32, 64], -1), linears, strict=True):
        if activations is None:
            assert error(part, forward(linear, x)) < 1e-5
        else:
            check_rounded(part, [linear], x, 3e-2)


@pytest.mark.parametrize("activations", FORMATS)
def test_the_gradient_passes_as_if_nothing_were_rounded(activations):
    packed = random_packed(32, 64, 32, activations=activations)
    x, grad = torch.randn(3, 64, requires_grad=True), torch.randn(3, 32)
    run(DENSE, x, DENSE.prepare([packed], x.dtype), None, [32], 32, activations).backward(grad)
    assert torch.allclose(x.grad, grad @ decode(packed), atol=1e-4)


@pytest.mark.parametrize("activations", FORMATS)
def test_the_int4_product_of_cpus_multiplies_rounded_activations(activations):
    packed = random_packed(32, 128, 64, activations=activations)
    backend = CpuInt4()
    x = torch.randn(6, 128).bfloat16()
    found = run(backend, x, backend.prepare([packed], x.dtype), None, [32], 64, activations)
    check_rounded(found, [packed], x, 3e-2)
    whole_numbers = activations == "int8" and products_are_exact()
    label = "cpu-int8" if whole_numbers else f"cpu-int4 ({activations} activations simulated)"
    assert explain(packed.layout, CPU, torch.bfloat16).label == label


def test_backends_say_that_a_format_is_only_simulated():
    packed = random_packed(32, 64, 32, bits=5, activations="mxfp4")
    assert choose(packed.layout, CPU, torch.float32) is DENSE
    assert explain(packed.layout, CPU, torch.float32).label == "decoded (mxfp4 activations simulated)"
    assert explain(random_packed(32, 64, 32, bits=5).layout, CPU, torch.float32).label == "decoded"
    assert "not in float32" in BY_NAME["triton"].refusal(packed.layout, torch.device("cuda"), torch.float32)


def test_a_compiled_layer_gives_the_same():
    packed = random_packed(32, 64, 32, activations="int8")
    tensors, x = DENSE.prepare([packed], torch.float32), torch.randn(4, 64)
    compiled = torch.compile(lambda x: run(DENSE, x, tensors, None, [32], 32, "int8"), backend="aot_eager")
    assert torch.allclose(compiled(x), run(DENSE, x, tensors, None, [32], 32, "int8"), atol=1e-4)
