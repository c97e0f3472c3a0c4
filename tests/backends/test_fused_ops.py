"""The operators that run linears with what comes before them: they give what it and the linear give one after the other."""

import pytest
import torch
import torch.nn.functional as F
from packed import error, random_packed

from pairquant.backends import fused_ops, ops
from pairquant.backends.table import BY_NAME
from pairquant.support.errors import KernelError

BACKENDS = {"cpu-int4": torch.bfloat16, "decoded": torch.float32}


def prepared(name, dtype, rows=48):
    return BY_NAME[name].prepare([random_packed(rows, 64, 32, 2)], dtype)


def inputs(dtype, shape=(2, 3)):
    x, residual = torch.randn(2, *shape, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x, residual, (1 + 0.1 * torch.arange(64)).to(dtype)


@pytest.mark.parametrize(("name", "dtype"), BACKENDS.items())
def test_norm_and_linear_are_what_they_are_one_after_the_other(name, dtype):
    x, residual, norm = inputs(dtype)
    tensors, bias = prepared(name, dtype), torch.randn(48, generator=torch.Generator().manual_seed(2)).to(dtype)
    y, h = fused_ops.norm_linear(x, residual, norm, 1e-5, tensors, bias, [48], 32, name)
    assert torch.equal(h, x + residual)
    normed = F.rms_norm(x.float() + residual.float(), (64,), eps=1e-5).to(dtype) * norm
    want = ops.run(BY_NAME[name], normed, tensors, bias, [48], 32)
    assert y.shape == (2, 3, 48)
    assert error(y, want) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("name", "dtype"), BACKENDS.items())
def test_silu_and_linear_are_what_they_are_one_after_the_other(name, dtype):
    gate, up, _ = inputs(dtype)
    tensors = prepared(name, dtype)
    y = fused_ops.silu_linear(torch.cat([gate, up], -1), tensors, None, [48], 32, name)
    assert torch.equal(y, ops.run(BY_NAME[name], F.silu(gate) * up, tensors, None, [48], 32))


def test_pytorch_finds_no_fault_with_the_operators():
    x, residual, norm = inputs(torch.bfloat16)
    rest = (prepared("cpu-int4", torch.bfloat16), None, [48], 32, "cpu-int4")
    torch.library.opcheck(fused_ops.norm_linear, (x, residual, norm, 1e-5, *rest))
    torch.library.opcheck(fused_ops.silu_linear, (torch.cat([x, residual], -1), *rest))


def test_no_tokens_at_all():
    x, residual, norm = inputs(torch.bfloat16, (0,))
    rest = (prepared("cpu-int4", torch.bfloat16), None, [48], 32, "cpu-int4")
    y, h = fused_ops.norm_linear(x, residual, norm, 1e-5, *rest)
    assert (y.shape, h.shape) == ((0, 48), (0, 64))
    assert fused_ops.silu_linear(torch.cat([x, residual], -1), *rest).shape == (0, 48)


def test_an_input_that_does_not_fit_is_named():
    x, residual, norm = inputs(torch.bfloat16)
    rest = (prepared("cpu-int4", torch.bfloat16), None, [48], 32, "cpu-int4")
    with pytest.raises(KernelError, match=r"\[2, 3, 32\], its last dimension must be 64"):
        fused_ops.norm_linear(x[..., :32], residual, norm, 1e-5, *rest)
    with pytest.raises(KernelError, match=r"\[2, 3, 64\], its last dimension must be 128"):
        fused_ops.silu_linear(x, *rest)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"residual": (6, 64)},
            r"the residual is bfloat16 \[6, 64\] on cpu, it must be as x, bfloat16 \[2, 3, 64\] on cpu",
        ),
        ({"residual": (2, 1, 64)}, r"the residual is bfloat16 \[2, 1, 64\]"),
        ({"residual": torch.float32}, r"the residual is float32 \[2, 3, 64\] on cpu, it must be as x, bfloat16"),
        ({"norm": (2, 3, 64)}, r"the norm's weight is bfloat16 \[2, 3, 64\] on cpu, for x, .* must have shape \[64\]"),
        ({"norm": (1,)}, r"the norm's weight is bfloat16 \[1\]"),
    ],
    ids=str,
)
def test_a_residual_or_norm_that_does_not_fit_is_named(changed, said):
    x, residual, norm = inputs(torch.bfloat16)
    given = {"x": x, "residual": residual, "norm": norm}
    for name, change in changed.items():
        given[name] = given[name].to(change) if isinstance(change, torch.dtype) else torch.ones(change, dtype=x.dtype)
    with pytest.raises(KernelError, match=said):
        fused_ops.norm_linear(
            **given,
            eps=1e-5,
            tensors=prepared("cpu-int4", x.dtype),
            bias=None,
            sizes=[48],
            group_size=32,
            backend="cpu-int4",
        )


def test_the_norms_weight_may_have_another_dtype_than_x():
    x, residual, norm = inputs(torch.bfloat16)
    rest = (prepared("cpu-int4", torch.bfloat16), None, [48], 32, "cpu-int4")
    y, _ = fused_ops.norm_linear(x, residual, norm.float(), 1e-5, *rest)
    assert error(y, fused_ops.norm_linear(x, residual, norm, 1e-5, *rest)[0]) < 1e-2
