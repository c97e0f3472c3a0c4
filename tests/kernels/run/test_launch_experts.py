"""The kernels for experts against each expert's decoded weight: on the GPU if there is one, else in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st
from packed import BOUND, DEVICE, GPU, error, random_packed

from pairquant.core.linear import decode, forward
from pairquant.kernels.run import launch, launch_experts
from pairquant.kernels.run.expert_weights import ExpertWeights
from pairquant.kernels.run.launch_experts import ExpertTiles
from pairquant.spec.activations import FORMATS
from pairquant.spec.linear import PackedLinear

TILES = [
    ExpertTiles(1, 32, 2, 3),
    ExpertTiles(1, 64, 1, 2, prefetch=2),
    ExpertTiles(8, 32, 2, 2),
    ExpertTiles(16, 64, 4, 2),
    ExpertTiles(16, 64, 4, 3, wide=True),
    ExpertTiles(32, 128, 4, 2, wide=True),
]
#: Experts, out_features of each linear, in_features, group size, rotations, bias.
SHAPES = [
    (5, (40, 40), 192, 64, 2, True),
    (3, (128,), 256, 128, 1, False),
    (9, (24, 8), 96, 32, 2, False),
    (4, (24, 8), 128, 32, 0, False),
]
if GPU:
    SHAPES += [(64, (768, 768), 2048, 128, 8, False), (128, (2048,), 768, 128, 8, False)]


def build(shape, bits=4, activations=None, form=None):
    """Experts that share a transform, as they are stored, and prepared; form: of their weights."""
    count, sizes, channels, group, rotations, bias = shape
    experts = []
    for e in range(count):
        linears = [
            random_packed(n, channels, group, rotations, 10 * e + i, bias, bits, activations=activations, weights=form)
            for i, n in enumerate(sizes)
        ]
        experts.append([_with_transform_of(p, (experts[0] if experts else linears)[0]).to(DEVICE) for p in linears])
    return experts, ExpertWeights.build(experts)


def _with_transform_of(linear, other):
    shared = {name: other[name].cpu() for name in ("theta", "pairs", "channel_scales")}
    return PackedLinear.from_tensors("", linear.layout, {**linear.tensors, **shared})


def expected(experts, x, ids, share):
    """float64 [A, N], zeros where the id stands for no expert."""
    rows = []
    for a, expert in enumerate(ids.flatten().tolist()):
        width = sum(linear.layout.out_features for linear in experts[0])
        if not 0 <= expert < len(experts):
            rows.append(torch.zeros(width, dtype=torch.float64, device=x.device))
            continue
        parts = []
        for linear in experts[expert]:
            y = decode(linear).double() @ x[a // share].double()
            parts.append(y if linear.bias is None else y + linear["bias"].double())
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_assignment_is_multiplied_by_its_expert(shape, tiles, dtype, generator):
    check(shape, tiles, dtype, generator)


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
@pytest.mark.parametrize("tiles", [TILES[2], TILES[4]], ids=str)
def test_at_other_widths(bits, tiles, generator):
    check((3, (32, 64), 192, 64, 1, False), tiles, torch.float16, generator, bits)


@pytest.mark.parametrize("tiles", [TILES[2], TILES[4]], ids=str)
def test_in_mxfp4(tiles, generator):
    check((3, (32, 64), 192, 64, 1, False), tiles, torch.bfloat16, generator, form="mxfp4")


def check(shape, tiles, dtype, generator, bits=4, form=None):
    experts, weights = build(shape, bits, form=form)
    tokens, chosen = (64, 3) if GPU else (5, 2)
    x = torch.randn(tokens, shape[2], generator=generator).to(DEVICE, dtype)
    ids = torch.randint(-1, shape[0] + 1, (tokens, chosen), generator=generator).to(DEVICE)
    found = launch_experts.product(x, weights, launch_experts.assign(ids, shape[0], tiles), chosen)
    real = ((ids >= 0) & (ids < shape[0])).flatten()
    want = expected(experts, x, ids, chosen)
    plain = torch.stack([torch.zeros_like(want[0]) if not r else w for r, w in zip(real, want, strict=True)])
    rounding = error(x.to(dtype).float() * (1 + torch.finfo(dtype).eps / 3), x.float()) + 1e-3
    assert error(torch.where(real[:, None], found.double(), 0.0), plain) < BOUND[dtype] * 4 * rounding


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("tiles", [TILES[0], TILES[4]], ids=str)
def test_an_activation_between_gate_and_up_comes_first(activation, tiles, generator):
    experts, weights = build((5, (64,), *SHAPES[0][2:]))
    weights = ExpertWeights(launch.with_matrix(weights.each), weights.count, weights.bias)
    joined = torch.randn(6, 2 * 192, generator=generator).to(DEVICE, torch.float16)
    ids = torch.tensor([[4, 0], [1, 1], [2, 3]], device=DEVICE)
    gate, up = joined.double().chunk(2, -1)
    functions = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}
    function = functions.get(activation, lambda g: torch.nn.functional.gelu(g, approximate="tanh"))
    given = launch_experts.assign(ids, 5, tiles)
    found = launch_experts.product(joined, weights, given, 1, activation)
    assert error(found, expected(experts, function(gate) * up, ids, 1)) < 4e-3


@pytest.mark.parametrize("activation", ["", "silu"])
@pytest.mark.parametrize("tiles", [TILES[0], TILES[2], TILES[4]], ids=str)
@pytest.mark.parametrize("activations", FORMATS)
def test_rounded_activations_are_what_experts_multiply(activations, tiles, activation, generator):
    experts, weights = build((5, (64,), 192, 64, 2, True), activations=activations)
    weights = replace(weights, each=launch.with_matrix(weights.each))
    weights = ExpertWeights.of_tensors(weights.tensors(), (64,), 64, weights.activations)
    x = torch.randn(6, 192, generator=generator).to(DEVICE, torch.float16)
    joined = torch.randn(6, 2 * 192, generator=generator).to(DEVICE, torch.float16)
    ids = torch.tensor([[4, 0], [1, 1], [2, 3]], device=DEVICE)
    given = launch_experts.assign(ids, 5, tiles)
    found = launch_experts.product(joined if activation else x, weights, given, 1, activation)
    gate, up = joined.double().chunk(2, -1)
    read = torch.nn.functional.silu(gate) * up if activation else x.double()
    parts = [forward(experts[e][0], row[None].float()) for e, row in zip(ids.flatten(), read, strict=True)]
    near, far = error(found, torch.cat(parts)), error(found, expected(experts, read, ids, 1))
    # Values just between two codes may be rounded to the other one, as the rotations differ in their last bits.
    assert near < 2e-2
    assert near < far / 3


def test_the_weighted_outputs_of_a_token_are_summed_without_ids_that_stand_for_none(generator):
    y = torch.randn(6, 700, generator=generator).to(DEVICE)
    y[1] = torch.nan
    ids = torch.tensor([[4, -1, 0], [1, 2, 3]], device=DEVICE)
    weights = torch.rand(2, 3, generator=generator).to(DEVICE)
    found = launch_experts.combine(y, weights, ids, 5)
    want = (torch.nan_to_num(y).view(2, 3, 700) * weights[:, :, None]).sum(1)
    torch.testing.assert_close(found, want)


@settings(max_examples=25, deadline=None)
@given(
    ids=st.lists(st.integers(-1, 6), min_size=1, max_size=80),
    experts=st.integers(1, 6),
    tokens=st.sampled_from([8, 16]),
)
def test_tiles_hold_every_assignment_once_with_its_own_expert(ids, experts, tokens):
    given_ids = torch.tensor(ids, device=DEVICE)[:, None]
    made = launch_experts.assign(given_ids, experts, ExpertTiles(tokens, 32, 2, 2))
    owners, members = made.owners.tolist(), made.members.view(-1, tokens).tolist()
    placed = [(a, owner) for owner, row in zip(owners, members, strict=True) if owner >= 0 for a in row if a < len(ids)]
    assert sorted(placed) == [(a, e) for a, e in enumerate(ids) if 0 <= e < experts]
    assert all(row == sorted(row) for owner, row in zip(owners, members, strict=True) if owner >= 0)


def test_stored_tensors_come_back_bit_for_bit():
    experts, weights = build(SHAPES[0])
    for e, linears in enumerate(experts):
        for index, linear in enumerate(linears):
            for name, tensor in weights.stored(e, index, linear.layout).items():
                assert torch.equal(tensor, linear[name])


def test_the_list_of_tensors_makes_the_same_weights():
    _, weights = build(SHAPES[0])
    again = ExpertWeights.of_tensors(weights.tensors(), (40, 40), 64)
    assert (again.count, again.layout) == (5, weights.layout)
    assert all(torch.equal(a, b) for a, b in zip(again.tensors(), weights.tensors(), strict=True))


@pytest.mark.parametrize("experts", [4, 32, 128])
def test_what_is_warmed_up_are_the_tiles_of_every_number_of_assignments(experts):
    most = 100 * experts
    met = {launch_experts.choose(assignments, experts) for assignments in range(1, most)}
    assert {launch_experts.choose(count, experts) for count in launch_experts.token_counts(experts)} == met
