"""The operator that runs prepared linears: what it accepts, what it says, and that PyTorch can trace it."""

import subprocess
import sys

import pytest
import torch
from packed import random_packed

from pairquant.backends import ops
from pairquant.backends.cpu_int4 import CpuInt4
from pairquant.backends.table import BACKENDS, BY_NAME, DENSE
from pairquant.core.linear import decode, forward
from pairquant.support.errors import KernelError

CPU_INT4 = BY_NAME["cpu-int4"]


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def prepared(packed):
    return CPU_INT4.prepare([packed], torch.bfloat16)


@pytest.mark.parametrize("activations", [None, "int8"])
def test_pytorch_finds_no_fault_with_the_operator(activations):
    packed = random_packed(32, 64, 32)
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    torch.library.opcheck(ops.rotated_linear, (x, prepared(packed), None, [32], 32, "cpu-int4", activations))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "channels", "group"), [(128, 256, 128), (48, 192, 64), (64, 64, 32), (512, 1024, 128)]
)
def test_int4_on_the_cpu(rows, channels, group, bias):
    packed = random_packed(rows, channels, group, bias=bias)
    x = torch.randn(2, 30, channels, generator=torch.Generator().manual_seed(1)).bfloat16()
    want = forward(packed, x)
    y = ops.run(CPU_INT4, x, prepared(packed), packed.bias, [rows], group)
    plain = x @ decode(packed).bfloat16().T + (packed.bias.bfloat16() if bias else 0)
    assert y.shape == (2, 30, rows)
    assert error(y, want) < 1.5 * error(plain, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decoded_weight_runs_as_any_other(dtype):
    packed = random_packed(40, 96, 32, bias=True)
    x = torch.randn(5, 96).to(dtype)
    y = ops.run(DENSE, x, DENSE.prepare([packed], dtype), packed.bias, [40], 32)
    assert y.dtype == dtype
    assert torch.equal(y, torch.nn.functional.linear(x, decode(packed).to(dtype), packed.bias.to(dtype)))


def test_no_tokens_at_all():
    weight = prepared(random_packed(32, 64, 32))
    assert ops.run(CPU_INT4, torch.zeros(0, 64).bfloat16(), weight, None, [32], 32).shape == (0, 32)


def test_gradient_through_a_frozen_linear():
    packed = random_packed(64, 128, 64)
    x = torch.randn(5, 128).bfloat16().requires_grad_()
    y = ops.run(CPU_INT4, x, prepared(packed), None, [64], 64)
    grad = torch.randn(5, 64).bfloat16()
    y.backward(grad)
    assert error(x.grad, grad.float() @ decode(packed)) < 1e-2


def test_wrong_inputs_of_a_linear():
    weight = prepared(random_packed(32, 64, 32))
    for x, words in (
        (torch.randn(2, 32).bfloat16(), "x has shape [2, 32], its last dimension must be 64"),
        (torch.randn(2, 64), "x is float32, allowed on cpu: bfloat16"),
    ):
        with pytest.raises(KernelError) as caught:
            ops.run(CPU_INT4, x, weight, None, [32], 32)
        assert words in str(caught.value)


def test_what_a_linear_keeps_is_traced_without_being_made():
    packed = random_packed(32, 64, 32)
    stored = [packed[name] for name in packed.layout.fields()]
    torch.library.opcheck(torch.ops.pairquant.decode.default, (stored, packed.layout.numbers()))
    fake = [tensor.to("meta") for tensor in stored]
    for keep in (False, True):
        made = torch.ops.pairquant.cpu_weights(fake, packed.layout.numbers(), keep)
        real = torch.ops.pairquant.cpu_weights(stored, packed.layout.numbers(), keep)
        assert [(t.shape, t.dtype) for t in made] == [(t.shape, t.dtype) for t in real]


@pytest.mark.parametrize("trains", [False, True])
def test_what_needs_no_operator_gives_the_same_bits_without_it(trains):
    packed = random_packed(32, 64, 32)
    tensors, x = prepared(packed), torch.randn(3, 64).bfloat16().requires_grad_(trains)
    assert ops._needs_operator(x, None) == trains
    want = torch.ops.pairquant.rotated_linear(x, tensors, None, [32], 32, "cpu-int4", None)
    assert torch.equal(ops.run(CPU_INT4, x, tensors, None, [32], 32), want)
    with torch.no_grad():
        assert not ops._needs_operator(x, None)


def test_a_bias_that_trains_needs_the_operator():
    assert ops._needs_operator(torch.zeros(1, 64), torch.zeros(32, requires_grad=True))


def test_importing_the_kernels_imports_neither_triton_nor_cuda():
    code = (
        "import sys, torch, pairquant.layers.linear, pairquant.backends.ops;"
        "assert not any(m == 'triton' or m.startswith('triton.') for m in sys.modules), 'triton';"
        "assert not torch.cuda.is_initialized(), 'cuda'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_backend_has_a_name_of_its_own():
    assert len(BY_NAME) == len(BACKENDS)
    assert isinstance(CPU_INT4, CpuInt4)
