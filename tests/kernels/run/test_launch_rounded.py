"""Activations rounded in the rotated basis, and their products, against the reference in core."""

import pytest
import torch

pytest.importorskip("triton")

from packed import DEVICE, error, random_packed

from pairquant.core.activations import rounded, rows_fp8, rows_int8
from pairquant.core.linear import forward, rotated_weight
from pairquant.core.rotation import rotate
from pairquant.kernels.run import launch, launch_rounded
from pairquant.kernels.run.table import Bytes, Narrow, RowBytes, WholeBytes, Wide
from pairquant.kernels.run.weights import KernelWeights
from pairquant.spec.activations import FORMATS
from pairquant.support.errors import KernelError

REFERENCE = {"int8": rows_int8, "fp8": rows_fp8}
#: (out_features of each linear, in_features, group size, rotations)
SHAPES = [((64, 40, 24), 576, 64, 8), ((200,), 160, 32, 0), ((8, 136), 384, 128, 8)]
TILES = Bytes(64, 16, 4, 2, 2)
EXACT = {1: TILES, 18: TILES, 130: WholeBytes(128, 32, 8, 2)}
#: Relative difference of a rotation by float16 matrices, which for bfloat16 x are split in two.
ROTATED = {torch.float16: 1e-3, torch.bfloat16: 1e-3}


def built(shape, activations, bits=4):
    """The packed linears, each with a transform of its own, and their kernel weights."""
    sizes, channels, group, rotations = shape
    made = [
        random_packed(n, channels, group, rotations, i, bits=bits, activations=activations) for i, n in enumerate(sizes)
    ]
    made = [packed.to(DEVICE) for packed in made]
    return made, launch_rounded.with_row_scales(launch.with_matrix(KernelWeights.build(made)), activations)


def uneven(tokens, channels, generator, dtype=torch.float16):
    """Activations with a row of zeros, if there are several rows, and one that is large."""
    x = torch.randn(tokens, channels, generator=generator)
    x[tokens // 2] *= 1000
    if tokens > 1:
        x[0] = 0
    return x.to(DEVICE, dtype)


def rotated(packed, x):
    scaled = x.float() * packed["channel_scales"].float()
    return rotate(scaled, packed["theta"].float(), packed["pairs"], packed.layout.group_size)


@pytest.mark.parametrize("activations", REFERENCE)
@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(1, torch.float16), (3, torch.bfloat16), (17, torch.bfloat16), (130, torch.float16), (257, torch.float16)],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes(shape, tokens, dtype, activations, generator):
    packed, weights = built(shape, activations)
    x, channels = uneven(tokens, shape[1], generator, dtype), shape[1]
    found = launch_rounded.codes(x, weights.rotation, activations)
    assert found.codes[..., channels:].float().count_nonzero() == 0
    for t, linear in enumerate(packed):
        x_rot, near = rotated(linear, x), ROTATED[dtype]
        codes, scales = REFERENCE[activations](x_rot)
        assert torch.allclose(found.scales[t], scales, rtol=near, atol=0)
        got, exact = found.codes[t, :, :channels].float(), x_rot / scales[:, None]
        half_step = torch.full_like(exact, 0.5) if activations == "int8" else exact.abs().clamp(min=2**-6) / 16
        assert ((got - exact).abs() <= half_step + 1.5 * near * exact.abs().amax(-1, keepdim=True)).all()
        assert (got != codes.float()).float().mean() < 30 * near


@pytest.mark.parametrize("activations", REFERENCE)
@pytest.mark.parametrize("step", [128, 16384])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_whose_weights_are_rounded_to_8_bits(shape, step, activations, generator):
    packed, weights = built(shape, activations)
    x = uneven(40, shape[1], generator, torch.float32)
    given = launch_rounded.codes(x, weights.rotation, activations)
    parts = []
    for t, linear in enumerate(packed):
        weight, start = rotated_weight(linear), weights.layout.starts[t]
        unit = weights.row_scales[start : start + len(weight), None]
        assert (weight.abs() <= unit * FORMATS[activations].largest * (1 + 1e-6)).all()
        numbers = (weight / unit).round() if activations == "int8" else (weight / unit).to(torch.float8_e4m3fn).float()
        parts.append((given.codes[t, :, : shape[1]].float() * given.scales[t, :, None]) @ (numbers * unit).T)
    bias = torch.randn(sum(shape[0]), generator=generator).to(DEVICE)
    got = launch_rounded.product(given, weights, bias, RowBytes(step, 128, 32, 8, 2), torch.float32)
    # Numbers just between two codes may be rounded to the other one. Without any rounding of weights, the error is 0.4 to 1 %
    # for int8 and 2 to 5 % for fp8.
    assert error(got, torch.cat(parts, -1) + bias) < {"int8": 2e-3, "fp8": 1e-2}[activations]


def summing(activations):
    """The error that sums of 8-bit products may have: float32's, and that of Hopper's fp8 products, which add in fewer bits."""
    return 2e-4 if activations == "fp8" and DEVICE.type == "cuda" else 1e-6


@pytest.mark.parametrize("activations", REFERENCE)
@pytest.mark.parametrize("tokens", [1, 18, 130])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_8_bits_are_those_of_the_codes(shape, tokens, activations, generator):
    packed, weights = built(shape, activations)
    x = uneven(tokens, shape[1], generator, torch.float32)
    given = launch_rounded.codes(x, weights.rotation, activations)
    values = given.codes[..., : shape[1]].double() * given.scales[..., None]
    want = torch.cat([v @ rotated_weight(p).double().T for v, p in zip(values, packed, strict=True)], dim=-1)
    bias = torch.randn(want.shape[1], generator=generator).to(DEVICE)
    got = launch_rounded.linear(x, weights, bias, EXACT[tokens], activations)
    for row, expected in zip(got, want + bias, strict=True):  # rows, as one is a thousand times as large
        assert error(row, expected) < summing(activations)
    assert weights.arrivals.count_nonzero() == 0


def test_linears_that_share_a_transform_read_the_same_codes(generator):
    packed, _ = built(((64, 40), 256, 128, 2), "int8")
    twin = packed[1].with_tensors(**{name: packed[0][name] for name in ("theta", "pairs", "channel_scales")})
    weights = launch.with_matrix(KernelWeights.build([packed[0], twin]))
    x = uneven(18, 256, generator, torch.float16)
    assert len(launch_rounded.codes(x, weights.rotation, "int8").codes) == 1
    want = torch.cat([forward(p, x) for p in (packed[0], twin)], -1)
    assert error(launch_rounded.linear(x, weights, None, TILES, "int8"), want) < 3e-3


@pytest.mark.parametrize("activations", ["int8", "fp8", "int4", "mxfp4"])
@pytest.mark.parametrize(
    ("tokens", "choice"), [(1, Narrow(32, 2, 2, 3)), (5, Narrow(16, 2)), (18, Wide(64, 32, 4, 2, 2))]
)
def test_products_of_16_bits_see_rounded_activations(activations, tokens, choice, generator):
    (packed,), weights = built(((72,), 192, 64, 3), activations)
    x = torch.randn(tokens, 192, generator=generator).to(DEVICE, torch.float16)
    x_rot = rounded(rotated(packed, x), activations, 64)
    if activations in REFERENCE:
        given = launch_rounded.codes(x, weights.rotation, activations)
        x_rot = given.codes[0, :, :192].float() * given.scales[0, :, None]
    want = x_rot @ rotated_weight(packed).T
    assert error(launch_rounded.linear(x, weights, None, choice, activations), want) < 5e-3
    plain = rotated(packed, x) @ rotated_weight(packed).T
    assert error(plain, want) > 6e-3, "this test would not see it if nothing were rounded"


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_other_widths(bits, generator):
    (packed,), weights = built(((64,), 128, 64, 1), "int8", bits)
    x = torch.randn(18, 128, generator=generator).to(DEVICE, torch.float16)
    choice = TILES if bits < 4 else Wide(64, 32, 4, 2, 2)
    assert error(launch_rounded.linear(x, weights, None, choice, "int8"), forward(packed, x)) < 5e-3


def test_float32_is_not_multiplied_in_16_bits(generator):
    _, weights = built(((64,), 128, 64, 1), "int4")
    with pytest.raises(
        KernelError, match="x is float32; 4-bit layers with int4 activations multiply float16 or bfloat16"
    ):
        launch_rounded.linear(torch.randn(2, 128).to(DEVICE), weights, None, Narrow(32, 2), "int4")
