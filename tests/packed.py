"""Random packed linears, and how near kernels must be, for tests that need no model."""

from __future__ import annotations

from dataclasses import replace

import torch

from pairquant.core.linear import forward
from pairquant.core.packing import pack
from pairquant.spec.linear import PackedLinear, Spec
from pairquant.spec.mx import E8M0_BIAS, MX_BLOCK

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
#: How many times the error of the same product in 16 bits a kernel's may be. The interpreter cuts off bits where a GPU rounds to
#: bfloat16: twice the error, and biased.
BOUND = {torch.float16: 1.5, torch.bfloat16: 1.5 if GPU else 6.0, torch.float32: 1.5}


def error(got, want):
    """The norm of the difference over that of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def check_rounded(found, linears, x, bound):
    """The outputs of these linears, side by side, are within a bound of the reference, which rounds activations, and nearer to
    it than to what the same weights give for activations that are not rounded: int8 changes these by less than 1 %.
    """
    plain = [
        PackedLinear(replace(one.layout, spec=replace(one.layout.spec, activations=None)), one.tensors)
        for one in linears
    ]
    rounded, exact = (torch.cat([forward(one, x) for one in some], -1) for some in (linears, plain))
    assert error(found, rounded) < min(bound, error(found, exact))


def with_uneven_groups(packed: PackedLinear, factor: float = 50.0) -> PackedLinear:
    """The scales of its first group so many times as large, and what that group reads so much smaller: no group matters less."""
    scales, inverse = packed["scales"].clone(), packed["channel_scales"].clone()
    scales[0] *= factor
    inverse[:, : packed.layout.group_size] /= factor
    return packed.with_tensors(scales=scales, channel_scales=inverse)


def random_packed(
    out_features, in_features, group_size, rotations=8, seed=0, bias=False, bits=4, activations=None, weights=None
) -> PackedLinear:
    """A linear of random codes, zero points, scales and rotations."""
    spec = Spec(bits, group_size, rotations, activations=activations, weights=weights)
    layout = spec.layout(in_features, out_features, bias)
    fields = layout.fields()
    g = torch.Generator().manual_seed(seed)
    words = {
        n: torch.randint(-(2**31), 2**31, fields[n].shape, generator=g).to(torch.int32)
        for n in ("qweight", "qzeros")
        if n in fields
    }
    if weights is None:
        scales = (torch.rand(fields["scales"].shape, generator=g) * 0.01 + 0.001).half()
    else:
        exponents = torch.randint(-9, -6, (in_features // MX_BLOCK, out_features), generator=g)
        scales = pack((exponents + E8M0_BIAS).to(torch.uint8), 8)
    order = torch.rand(rotations, layout.num_groups, group_size, generator=g).argsort(-1)
    tensors = {
        **words,
        "scales": scales,
        "theta": torch.randn(fields["theta"].shape, generator=g).half(),
        "pairs": order.to(torch.int16).view(rotations, in_features),
        "channel_scales": (torch.rand(1, in_features, generator=g) + 0.5).half(),
    }
    if bias:
        tensors["bias"] = torch.randn(out_features, generator=g).half()
    return PackedLinear.from_tensors("random", layout, tensors)
