"""The int4 product of experts on CPUs against the reference of each expert, and the codes that come back from its form."""

import pytest
import torch
from packed import check_rounded, error, random_packed

from pairquant.core.linear import forward
from pairquant.kernels.run.cpu_experts import CpuExpertWeights
from pairquant.spec.experts import TRANSFORM
from pairquant.spec.linear import PackedLinear

#: Rows of each linear, channels, group size, rotations, bias; PyTorch packs rows in blocks of 64, and what remains otherwise.
SHAPES = [
    ((48, 48), 96, 32, 2, True),
    ((16,), 128, 128, 1, False),
    ((64, 64), 192, 64, 2, False),
    ((80,), 128, 32, 0, True),
]
COUNT = 4


def experts_of(shape, own=False, activations=None):
    sizes, channels, group, rotations, bias = shape
    experts = []
    for e in range(COUNT):
        linears = [
            random_packed(rows, channels, group, rotations, 10 * e + i, bias, activations=activations)
            for i, rows in enumerate(sizes)
        ]
        first = (linears if own or not experts else experts[0])[0]
        shared = {name: first[name] for name in TRANSFORM}
        experts.append([PackedLinear.from_tensors("", one.layout, {**one.tensors, **shared}) for one in linears])
    return experts


def each(linears, x):
    return torch.cat([forward(linear, x) for linear in linears], -1)


@pytest.mark.parametrize("own", [False, True], ids=["one transform", "a transform for each"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_expert_multiplies_its_rows(shape, own, generator):
    experts = experts_of(shape, own)
    weights = CpuExpertWeights.build(experts)
    assert (weights.matrix is None) == own
    x = torch.randn(7, shape[1], generator=generator).bfloat16()
    runs, rows = [(2, 3), (0, 1), (3, 40)], torch.randint(0, 7, (44,), generator=generator)
    found = weights.product(x, runs, rows)
    wanted = torch.cat([each(experts[e], part) for (e, _), part in zip(runs, x[rows].split([3, 1, 40]), strict=True)])
    assert error(found, wanted) < 0.01
    assert torch.equal(weights.product(x[rows], runs), found)


@pytest.mark.parametrize("activations", ["int8", "mxfp4"])
def test_what_experts_read_is_rounded(activations, generator):
    experts = experts_of(SHAPES[0], activations=activations)
    x = torch.randn(30, 96, generator=generator).bfloat16()
    check_rounded(CpuExpertWeights.build(experts).product(x, [(1, 30)]), experts[1], x, 0.02)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_stored_codes_come_back(shape):
    experts = experts_of(shape)
    weights = CpuExpertWeights.build(experts)
    for number, linears in enumerate(experts):
        for index, linear in enumerate(linears):
            found = weights.stored(number, index, linear.layout)
            assert set(found) == {"qweight"}
            assert torch.equal(found["qweight"], linear["qweight"])


def test_the_codes_are_held_once():
    weights = CpuExpertWeights.build(experts_of(SHAPES[2]))
    held = weights.packed.nbytes + weights.grid.nbytes
    assert held * 8 == COUNT * 128 * 192 * (4 + 32 / 64), "bits of a weight: its code, and its share of scale and zero"
