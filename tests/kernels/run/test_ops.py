"""The operators: what they accept, what they say, and that PyTorch can trace them."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import random_packed

from pairquant.core.linear import decode, forward
from pairquant.core.rotation import rotate
from pairquant.kernels.run import cpu, ops
from pairquant.support.errors import KernelError


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def transforms(channels, group, rotations, count=2):
    linears = [random_packed(8, channels, group, rotations, seed) for seed in range(count)]
    theta, pairs, scales = (torch.stack([getattr(p, n) for p in linears]) for n in ("theta", "pairs", "channel_scales"))
    return theta.double().float(), pairs, scales[:, 0].float()


@given(
    tokens=st.integers(1, 9),
    groups=st.integers(1, 5),
    group=st.sampled_from([32, 64, 128]),
    rotations=st.integers(0, 16),
    count=st.integers(1, 3),
)
def test_rotate_and_its_gradients_match_core(tokens, groups, group, rotations, count):
    theta, pairs, scales = transforms(groups * group, group, rotations, count)
    x = torch.randn(tokens, groups * group)
    grad = torch.randn(count, tokens, groups * group)

    def gradients(function):
        leaves = [t.clone().requires_grad_() for t in (x, theta, scales)]
        function(*leaves).backward(grad)
        return [leaf.grad for leaf in leaves]

    def reference(x, theta, scales):
        return torch.stack([rotate(x * s, t, p, group) for s, t, p in zip(scales, theta, pairs, strict=True)])

    ours = gradients(lambda x, theta, scales: ops.rotate(x, theta, pairs, scales, group))
    for got, want in zip(ours, gradients(reference), strict=True):
        assert torch.allclose(got, want if want is not None else torch.zeros_like(got), atol=1e-3, rtol=1e-4)
    assert torch.allclose(ops.rotate(x, theta, pairs, scales, group), reference(x, theta, scales), atol=1e-4)


def test_rotate_takes_any_strides_and_leading_dimensions():
    theta, pairs, scales = transforms(64, 32, 3)
    x = torch.randn(2, 64, 5).transpose(1, 2)
    y = ops.rotate(x, theta, pairs, scales, 32)
    assert y.shape == (2, 2, 5, 64)
    assert torch.equal(y, ops.rotate(x.contiguous(), theta, pairs, scales, 32))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 63)}, "last dimension must be 64"),
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "x is float64, allowed on cpu: float16, bfloat16, float32"),
        ({"x": torch.zeros(2, 64, device="meta")}, None),
        ({"group_size": 48}, "group size is 48, allowed: 32, 64, 128"),
        ({"theta": torch.zeros(2, 3, 31)}, "needed are [T, K, C/2] and [T, K, C]"),
    ],
)
def test_rotate_says_what_is_wrong(change, words):
    theta, pairs, scales = transforms(64, 32, 3)
    arguments = {"x": torch.zeros(2, 64), "theta": theta, "pairs": pairs, "scales": scales, "group_size": 32} | change
    if words is None:  # PyTorch itself refuses to mix meta and real tensors, or runs the fake
        assert ops.rotate(**arguments).is_meta
        return
    with pytest.raises(KernelError) as caught:
        ops.rotate(**arguments)
    assert words in str(caught.value)


def test_pytorch_finds_no_fault_with_the_operators():
    theta, pairs, scales = transforms(64, 32, 2)
    rotation = ops.RotationWeights.build(theta, pairs, scales, 32)
    x = torch.randn(3, 64, requires_grad=True)
    coefficients = rotation.coefficients.detach().requires_grad_()
    torch.library.opcheck(ops.rotate_op, (x, coefficients, rotation.partners, scales.requires_grad_()))
    packed = random_packed(32, 64, 32)
    weight = cpu.CpuWeights.build(packed).tensors()
    arguments = (torch.randn(3, 64).bfloat16().requires_grad_(), weight, None, [32], 32)
    torch.library.opcheck(ops.rotated_linear, arguments)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "channels", "group"), [(128, 256, 128), (48, 192, 64), (64, 64, 32), (512, 1024, 128)]
)
def test_int4_on_the_cpu(rows, channels, group, bias):
    packed = random_packed(rows, channels, group, bias=bias)
    x = torch.randn(2, 30, channels, generator=torch.Generator().manual_seed(1)).bfloat16()
    want = forward(packed, x)
    y = torch.ops.pairquant.rotated_linear(x, cpu.CpuWeights.build(packed).tensors(), packed.bias, [rows], group)
    plain = x @ decode(packed).bfloat16().T + (packed.bias.bfloat16() if bias else 0)
    assert y.shape == (2, 30, rows)
    assert error(y, want) < 1.5 * error(plain, want)


def test_no_tokens_at_all():
    theta, pairs, scales = transforms(64, 32, 3)
    assert ops.rotate(torch.zeros(2, 0, 64), theta, pairs, scales, 32).shape == (2, 2, 0, 64)
    weight = cpu.CpuWeights.build(random_packed(32, 64, 32)).tensors()
    assert torch.ops.pairquant.rotated_linear(torch.zeros(0, 64).bfloat16(), weight, None, [32], 32).shape == (0, 32)


def test_gradient_through_a_frozen_linear():
    packed = random_packed(64, 128, 64)
    x = torch.randn(5, 128).bfloat16().requires_grad_()
    y = torch.ops.pairquant.rotated_linear(x, cpu.CpuWeights.build(packed).tensors(), None, [64], 64)
    grad = torch.randn(5, 64).bfloat16()
    y.backward(grad)
    assert error(x.grad, grad.float() @ decode(packed)) < 1e-2


def test_wrong_inputs_of_a_linear():
    packed = random_packed(32, 64, 32)
    weight = cpu.CpuWeights.build(packed).tensors()
    for x, words in (
        (torch.randn(2, 32).bfloat16(), "x has shape [2, 32], its last dimension must be 64"),
        (torch.randn(2, 64), "x is float32, allowed on cpu: bfloat16"),
    ):
        with pytest.raises(KernelError) as caught:
            torch.ops.pairquant.rotated_linear(x, weight, None, [32], 32)
        assert words in str(caught.value)


def test_importing_the_kernels_imports_neither_triton_nor_cuda():
    code = (
        "import sys, torch, pairquant.layers.linear, pairquant.kernels.run.ops;"
        "assert not any(m == 'triton' or m.startswith('triton.') for m in sys.modules), 'triton';"
        "assert not torch.cuda.is_initialized(), 'cuda'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
