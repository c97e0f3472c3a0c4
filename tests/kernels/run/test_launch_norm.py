"""Linears that compute what comes before them, against the norm or activation in float64 and then the reference."""

import pytest
import torch

pytest.importorskip("triton")

from packed import BOUND, DEVICE, GPU, error, random_packed

from pairquant.core.linear import decode
from pairquant.kernels.run import launch, launch_norm
from pairquant.kernels.run.norm import Norm
from pairquant.kernels.run.table import Dense, Narrow, Wide
from pairquant.kernels.run.weights import KernelWeights

EPS = 1e-5
#: out_features of each linear, in_features, group size, rotations, whether all have the same transform: blocks that are not
#: full, several blocks, no rotations, and transforms of their own.
SHAPES = [
    ((128,), 256, 128, 8, True),
    ((64, 40, 24), 192, 64, 3, True),
    ((40, 24), 352, 32, 2, False),
    ((200,), 160, 32, 0, True),
]
NARROW, SPLIT, WIDE = Narrow(16, 2, 1, 3), Narrow(32, 2, 2, 3), Wide(64, 32, 4, 2, 2)
#: Tokens and a choice for them.
CHOICES = [(1, NARROW), (2, SPLIT), (9, WIDE), (33, WIDE), (5, Dense(128))]
if GPU:
    CHOICES += [(8, Narrow(32, 4, 1, 4, True, 8)), (64, Wide(128, 64, 8, 4, 1)), (300, Wide(128, 256, 8, 3, 1))]
DTYPES = [torch.bfloat16, torch.float16]


def built(shape):
    """The packed linears, and their kernel weights with the dense rotation."""
    sizes, channels, group, rotations, shared = shape
    packed = [random_packed(n, channels, group, rotations, i) for i, n in enumerate(sizes)]
    if shared:
        transform = {name: packed[0][name] for name in ("theta", "pairs", "channel_scales")}
        packed = [one.with_tensors(**transform) for one in packed]
    packed = [one.to(DEVICE) for one in packed]
    weights = launch.with_matrix(KernelWeights.build(packed))
    assert weights.rotation.transforms == (1 if shared else len(sizes))
    return packed, weights


def inputs(tokens, channels, dtype, generator):
    """x and a residual with an outlier, rows further apart than they are long, and the weight of a norm."""
    x, residual = torch.randn(2, tokens, channels + 32, generator=generator).to(DEVICE, dtype)[..., :channels]
    residual[:, 3] *= 50
    norm = (1 + 0.3 * torch.randn(channels, generator=generator)).to(DEVICE, dtype)
    return x, residual, norm


def normalized(x, residual, norm):
    """In float64."""
    h = x.double() + residual.double()
    return h / (h.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.double()


def total(x, residual):
    """x + residual in their dtype; in bfloat16 as Triton's interpreter rounds, which cuts bits off."""
    h = x.float() + residual.float()
    if x.dtype == torch.bfloat16 and not GPU:
        h = (h.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return h.to(x.dtype)


def limits(packed, given, dtype):
    """The outputs of these linears for an input in float64, and the error that is allowed: a multiple of that of dense linears
    of this dtype.
    """
    dense = [decode(one).double() for one in packed]
    want = torch.cat([given @ weight.T for weight in dense], -1)
    plain = torch.cat([given.to(dtype) @ weight.to(dtype).T for weight in dense], -1)
    return want, BOUND[dtype] * error(plain, want)


@pytest.mark.parametrize(("tokens", "choice"), CHOICES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_linear_in_one(shape, tokens, choice, generator):
    check_norm_and_linear(shape, tokens, choice, torch.bfloat16, generator)


@pytest.mark.parametrize(("tokens", "choice"), [(2, NARROW), (9, WIDE)], ids=str)
def test_in_float16_the_norm_is_computed_before(tokens, choice, generator):
    check_norm_and_linear(SHAPES[1], tokens, choice, torch.float16, generator)


def check_norm_and_linear(shape, tokens, choice, dtype, generator):
    packed, weights = built(shape)
    x, residual, norm = inputs(tokens, shape[1], dtype, generator)
    before = x.clone(), residual.clone()
    bias = torch.randn(sum(shape[0]), generator=generator).to(DEVICE, dtype)
    y, h = launch_norm.norm_linear(x, residual, Norm(norm, EPS), weights, bias, choice)
    want, limit = limits(packed, normalized(x, residual, norm), dtype)
    assert error(y.double() - bias.double(), want) < limit + 0.004  # of rounding y + bias
    assert torch.equal(h, total(x, residual))
    assert all(map(torch.equal, (x, residual), before)), "others still read these"
    assert weights.arrivals.count_nonzero() == 0
    if GPU:
        again, _ = launch_norm.norm_linear(x, residual, Norm(norm, EPS), weights, bias, choice)
        assert torch.equal(y, again), "not reproducible"


def test_in_float16_nothing_overflows_before_it_is_normalized(generator):
    """Sums of hidden states that float16 holds, but not times the norm's weight."""
    packed, weights = built(SHAPES[0])
    x, residual, norm = inputs(2, 256, torch.float16, generator)
    residual, norm = residual * 200, norm * 20
    assert normalized(x, residual, norm).abs().max() < 1000
    assert ((x + residual) * norm).isinf().any()
    y, _ = launch_norm.norm_linear(x, residual, Norm(norm, EPS), weights, None, NARROW)
    want, limit = limits(packed, normalized(x, residual, norm), torch.float16)
    assert error(y, want) < limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [192, 1500])
def test_the_norm_alone_is_that_of_vllm(channels, dtype, generator):
    x, residual, norm = inputs(3, channels, dtype, generator)
    normed, h = launch_norm.add_norm(x, residual, Norm(norm, EPS))
    exact = x.float() + residual.float()
    scaled = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + EPS)
    assert torch.equal(h, total(x, residual))
    assert error(normed, scaled.to(dtype) * norm) < (1e-3 if GPU or dtype == torch.float16 else 8e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "choice"), [CHOICES[0], *CHOICES[2:]], ids=str)
def test_silu_and_linear_in_one(tokens, choice, dtype, generator):
    shape = SHAPES[1]
    packed, weights = built(shape)
    x = torch.randn(tokens, 2 * shape[1], generator=generator).to(DEVICE, dtype)
    gate, up = x.double().chunk(2, -1)
    want, limit = limits(packed, gate * gate.sigmoid() * up, dtype)
    assert error(launch_norm.silu_linear(x, weights, None, choice), want) < limit


def test_without_a_transform_the_norm_is_computed_on_the_way(generator):
    (packed,), _ = built(SHAPES[3])
    packed["channel_scales"].fill_(1)
    weights = launch.with_matrix(KernelWeights.build([packed]))
    assert weights.rotation.idle
    weights = KernelWeights.of_tensors(weights.tensors(), (200,), 32)
    x, residual, norm = inputs(3, 160, torch.bfloat16, generator)
    for choice in (NARROW, WIDE):
        y, _ = launch_norm.norm_linear(x, residual, Norm(norm, EPS), weights, None, choice)
        want, limit = limits([packed], normalized(x, residual, norm), torch.bfloat16)
        assert error(y, want) < limit
