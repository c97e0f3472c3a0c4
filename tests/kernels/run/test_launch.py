"""The Triton kernels against the reference in core: on the GPU if there is one, else in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from packed import BOUND, DEVICE, GPU, error, random_packed

from pairquant.core.grids import MxGrid
from pairquant.core.linear import Transform, assemble, decode, rotated_weight
from pairquant.core.rotation import rotate, rotation_matrix
from pairquant.kernels.run import launch
from pairquant.kernels.run.table import Dense, Narrow, Wide
from pairquant.kernels.run.tune import random_weights
from pairquant.kernels.run.weights import KernelWeights
from pairquant.spec.linear import Spec

NARROW = [Narrow(16, 2, 1, 3), Narrow(32, 2, 2, 3), Narrow(64, 1, 4, 2)]
WIDE = [Wide(64, 16, 4, 3, 1), Wide(64, 32, 4, 2, 2), Wide(128, 64, 8, 2, 1)]
if GPU:
    NARROW += [Narrow(16, 4, 1, 5, True, 8), Narrow(32, 4, 1, 4, True, 8), Narrow(32, 2, 8, 4)]
    WIDE += [Wide(128, 128, 8, 3, 1), Wide(128, 256, 8, 3, 1), Wide(64, 128, 4, 3, 2)]
#: (out_features of each linear, in_features, group size, rotations)
SHAPES = [((128,), 256, 128, 8), ((64, 40, 24), 192, 64, 3), ((200,), 160, 32, 0), ((8, 136), 384, 128, 1)]
NARROW_TOKENS, WIDE_TOKENS = [1, 5], [18]
if GPU:  # larger: the ratio of two errors is then no matter of luck
    SHAPES = [((512,), 1024, 128, 8), ((256, 136, 24), 576, 64, 3), ((1000,), 1184, 32, 0), ((8, 1032), 1536, 128, 1)]
    NARROW_TOKENS, WIDE_TOKENS = [1, 3, 16], [2, 17, 65, 300]


def built(shape, seed=0, bits=4, weights=None):
    """The packed linears, and their kernel weights with the dense rotation."""
    sizes, channels, group, rotations = shape
    packed = [
        random_packed(n, channels, group, rotations, seed + i, bits=bits, weights=weights) for i, n in enumerate(sizes)
    ]
    packed = [p.to(DEVICE) for p in packed]
    return packed, launch.with_matrix(KernelWeights.build(packed))


def exact(packed, x):
    """In float64 throughout, from the stored numbers."""
    parts = []
    for p in packed:
        scaled = x.double() * p["channel_scales"].double()
        x_rot = rotate(scaled, p["theta"].double(), p["pairs"], p.layout.group_size)
        parts.append(x_rot @ rotated_weight(p).double().T)
    return torch.cat(parts, dim=-1)


def bound(packed, x, want, dtype):
    """The error of a product in x's dtype with the dequantized weight, times the factor that is allowed."""
    dense = torch.cat([decode(p) for p in packed]).to(dtype)
    plain = error((x.to(dtype) @ dense.T), want)
    return BOUND[dtype] * plain + (1e-6 if dtype == torch.float32 else 0)


def check_products(shape, tokens, dtype, generator, choices, bits=4, weights=None):
    """Accurate, every time the same, and the counters back at zero."""
    packed, weights = built(shape, bits=bits, weights=weights)
    x = torch.randn(tokens, shape[1], generator=generator).to(DEVICE, dtype)
    want = exact(packed, x)
    limit = bound(packed, x, want, dtype)
    for choice in choices:
        y = launch.linear(x, weights, None, choice)
        assert error(y, want) < limit, f"{choice}: {error(y, want) / limit:.3f} of what is allowed"
        if GPU:
            assert torch.equal(y, launch.linear(x, weights, None, choice)), "not reproducible"
    assert weights.arrivals.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", NARROW_TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_narrow_products(shape, tokens, dtype, generator):
    check_products(shape, tokens, dtype, generator, NARROW)


@pytest.mark.parametrize("channels", [256, 160], ids=["whole blocks", "padded"])
def test_without_a_transform_products_of_few_tokens_read_x_itself(channels, generator, monkeypatch):
    (packed,), _ = built(((136,), channels, 32, 0))
    packed["channel_scales"].fill_(1)
    weights = launch.with_matrix(KernelWeights.build([packed]))
    assert weights.rotation.idle
    again = KernelWeights.of_tensors(weights.tensors(), (136,), 32)
    assert again.rotation.idle
    launched = []
    givens = launch._givens
    monkeypatch.setattr(launch, "_givens", lambda *a, **k: launched.append(k) or givens(*a, **k))
    for tokens, choice in ((3, NARROW[0]), (18, WIDE[0]), (18, Dense(128))):
        x = torch.randn(tokens, channels, generator=generator).to(DEVICE, torch.float16)
        before = len(launched)
        y = launch.linear(x, again, None, choice)
        want = exact([packed], x)
        assert error(y, want) < bound([packed], x, want, torch.float16)
        assert (len(launched) == before) == (isinstance(choice, Narrow) and channels % 128 == 0)


def test_linears_that_run_as_one_need_no_launch_either_if_none_has_a_transform(generator, monkeypatch):
    packed, _ = built(((64, 40, 24), 256, 64, 0))
    for linear in packed:
        linear["channel_scales"].fill_(1)
    weights = launch.with_matrix(KernelWeights.build(packed))
    assert weights.rotation.idle
    monkeypatch.setattr(launch, "_givens", None)
    x = torch.randn(2, 256, generator=generator).to(DEVICE, torch.float16)
    want = exact(packed, x)
    assert error(launch.linear(x, weights, None, NARROW[0]), want) < bound(packed, x, want, torch.float16)


class Recorded:
    """Stands for a kernel, and notes the options of its launches."""

    def __init__(self):
        self.options = []

    def __getitem__(self, grid):
        return lambda *_, **options: self.options.append(options)


@pytest.mark.parametrize("overlap", [True, False])
def test_the_rotation_in_steps_starts_early_but_not_right_after_its_constants_were_written(
    overlap, generator, monkeypatch
):
    _, weights = built(((136,), 256, 64, 2))
    x = torch.randn(2, 256, generator=generator).to(DEVICE, torch.float16)
    monkeypatch.setattr(launch, "features", lambda _: {"NATIVE": True, "DEPENDENT": True})
    monkeypatch.setattr(launch, "givens_kernel", kernel := Recorded())
    launch.rotate_padded(x, weights.rotation, False, overlap)
    launch.rotation_blocks(weights.rotation, 256, torch.float16, True)
    given, identity = kernel.options
    assert given["launch_pdl"]
    assert given["TRIGGER"] == overlap
    assert not identity.get("launch_pdl", False)
    assert not identity["DEPENDENT"]
    assert not identity["TRIGGER"]


def test_channel_scales_alone_are_a_transform():
    (packed,), weights = built(((136,), 256, 64, 0))
    assert not (packed["channel_scales"] == 1).all()
    assert not weights.rotation.idle


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", WIDE_TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_wide_products(shape, tokens, dtype, generator):
    check_products(shape, tokens, dtype, generator, [choice for choice in WIDE if tokens <= 8 * choice.tokens])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_mxfp4_products(shape, dtype, generator):
    check_products(shape, 5, dtype, generator, [NARROW[1]], weights="mxfp4")
    check_products(shape, 18, dtype, generator, [WIDE[1], Dense(128)], weights="mxfp4")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_mxfp4_code_stands_for_its_value(dtype):
    """Without a transform all that 16 bits hold is exact, from the smallest scales to large ones."""
    codes = torch.arange(256 * 128).div(5, rounding_mode="floor").view(256, 128) % 16
    exponents = torch.arange(256 * 4).view(-1, 4) % 23 - 13
    layout = Spec(4, 128, 0, weights="mxfp4").layout(128, 256)
    grid = MxGrid(2.0**exponents)
    packed = assemble(layout, Transform.identity(128, 128), codes.to(torch.uint8), grid, None).to(DEVICE)
    weights = launch.with_matrix(KernelWeights.build([packed]))
    assert torch.equal(launch.decode(weights, dtype).float(), rotated_weight(packed))
    x = torch.eye(128, device=DEVICE, dtype=dtype)
    if dtype != torch.float32:
        y = launch.linear(x, weights, None, WIDE[1])
        assert torch.equal(y.T.float(), rotated_weight(packed))
        y = launch.linear(x[:8], weights, None, NARROW[0])
        assert torch.equal(y.T.float(), rotated_weight(packed)[:, :8])


#: As `SHAPES`, for widths whose rows are stored 32 at a time.
OTHER_SHAPES = [((160,), 256, 128, 2), ((96, 160), 160, 32, 1)]
OTHER_BITS = [2, 3, 5, 6, 8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", OTHER_BITS)
@pytest.mark.parametrize("shape", OTHER_SHAPES, ids=str)
def test_products_at_other_widths(shape, bits, dtype, generator):
    check_products(shape, 1, dtype, generator, NARROW[:1], bits)
    check_products(shape, 5, dtype, generator, NARROW[1:2], bits)
    check_products(shape, 18, dtype, generator, [WIDE[1], Dense(128)], bits)


def test_stages_of_wider_codes_fit_into_shared_memory():
    cpu = torch.device("cpu")
    assert launch.stages_for(3, 4, 128, 256, 1, cpu) == 3, "as it was measured"
    assert launch.stages_for(3, 8, 128, 256, 1, cpu) == 2
    assert launch.stages_for(4, 8, 64, 0, 2, cpu) == 4
    assert launch.stages_for(3, 8, 512, 512, 1, cpu) == 1


@pytest.mark.parametrize("bits", OTHER_BITS)
def test_decoded_weights_at_other_widths(bits):
    packed, weights = built(OTHER_SHAPES[1], bits=bits)
    want = torch.cat([decode(p) for p in packed])
    assert error(launch.decode(weights, torch.float32), want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [128, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoded_products(shape, rows, dtype, generator):
    packed, weights = built(shape)
    x = torch.randn(7, shape[1], generator=generator).to(DEVICE, dtype)
    want = exact(packed, x)
    assert error(launch.linear(x, weights, None, Dense(rows)), want) < bound(packed, x, want, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoded_weights(shape):
    packed, weights = built(shape)
    want = torch.cat([decode(p) for p in packed])
    assert error(launch.decode(weights, torch.float32), want) < 1e-6
    assert error(launch.decode(weights, torch.float16), want) < 5e-4


def test_bias_and_a_shared_transform(generator):
    packed, _ = built(((64, 40), 128, 64, 2))
    twin = packed[1].with_tensors(**{name: packed[0][name] for name in ("theta", "pairs", "channel_scales")})
    weights = launch.with_matrix(KernelWeights.build([packed[0], twin]))
    assert weights.rotation.transforms == 1
    bias = torch.randn(104, generator=generator).to(DEVICE).half()
    for tokens, choice in ((2, NARROW[1]), (18, WIDE[1]), (18, Dense(128))):
        x = torch.randn(tokens, 128, generator=generator).to(DEVICE).half()
        want = exact([packed[0], twin], x) + bias.double()
        assert error(launch.linear(x, weights, bias, choice), want) < 1e-3


@pytest.mark.parametrize("shape", [*SHAPES, ((4104, 8), 96, 32, 2)], ids=str)
def test_stored_tensors_come_back_bit_for_bit(shape):
    packed, weights = built(shape)
    for index, linear in enumerate(packed):
        for name, tensor in weights.stored(index, linear.layout).items():
            assert torch.equal(tensor, linear[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 33, 600])
@pytest.mark.parametrize(("channels", "group", "rotations"), [(32, 32, 16), (192, 64, 3), (256, 128, 8), (160, 32, 0)])
def test_rotation(channels, group, rotations, tokens, dtype, generator):
    packed, weights = built(((8, 8), channels, group, rotations))
    wide = torch.randn(tokens, 2 * channels, generator=generator).to(DEVICE, dtype)
    x = wide[:, :channels]  # rows are not adjacent
    natural = NARROW[0]  # `Wide` products want another order
    y = launch.rotate_for(natural, x, weights)
    for t, p in enumerate(packed):
        want = rotate(x.double() * p["channel_scales"].double(), p["theta"].double(), p["pairs"], group)
        limit = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3 if GPU else 1e-2}[dtype]
        assert error(y[t, :, :channels], want) < limit
        assert y[t, :, channels:].count_nonzero() == 0


def test_dense_rotation_is_the_matrix_of_core():
    (packed,), weights = built(((64,), 192, 64, 5))
    matrix = rotation_matrix(packed["theta"].float(), packed["pairs"], 64)
    blocks = launch.rotation_blocks(weights.rotation, 256, torch.float32, mma_order=False)[0]
    scales = packed["channel_scales"].float()[0]
    for group in range(3):
        channel = 64 * group
        part = blocks[channel % 128 : channel % 128 + 64, channel : channel + 64]
        assert torch.allclose(part, scales[channel : channel + 64, None] * matrix[group], atol=1e-6)
    assert blocks[64:, 192:].count_nonzero() == 0 == blocks[:64, 64:128].count_nonzero()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu():
    packed = random_packed(64, 128, 64)
    there = packed.to("cuda:1")
    weights = launch.with_matrix(KernelWeights.build([there]))
    x = torch.randn(3, 128, dtype=torch.half, device="cuda:1")
    want = exact([packed], x.cpu())
    assert error(launch.linear(x, weights, None, NARROW[0]).cpu(), want) < 1e-3


def test_no_number_of_tokens_has_a_rotation_kernel_of_its_own(monkeypatch):
    """Each set of constants is compiled when it is first met, and a request would wait for that."""
    weights = launch.with_matrix(random_weights((128,), 512, 64, torch.device("cpu")))
    seen = []
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 6)
    monkeypatch.setattr(launch, "start", lambda kernel, grid, tensors, numbers, **constants: seen.append(constants))
    for tokens in range(1, 4096, 31):
        launch.rotate_padded(torch.empty(tokens, 512), weights.rotation, wide=True, overlap=True)
    assert len(seen) > 100
    assert len({tuple(constants.values()) for constants in seen}) <= 6


@pytest.mark.parametrize("rows", [128, 4096], ids=["in chunks", "at once"])
def test_autocast_changes_no_dtype(rows):
    weights = launch.with_matrix(random_weights((200, 64), 128, 64, torch.device("cpu")))
    x, bias = torch.randn(3, 128), torch.randn(264)
    expected = launch.linear(x, weights, bias, Dense(rows))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = launch.linear(x, weights, bias, Dense(rows))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
