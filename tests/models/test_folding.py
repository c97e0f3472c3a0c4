"""Rewriting weights: rows, columns, norms and pairs, each by what the layers compute before and after."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pairquant.core.rotation import rotate_dense
from pairquant.models.folding import Foldable, Matrix, Norm, Pair, Transforms, fold, restored


@pytest.fixture
def rotation():
    return torch.linalg.qr(torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)))[0]


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def scales(size):
    return (0.3 * random(size)).exp()


@pytest.mark.parametrize("make", [lambda c, n: nn.Linear(c, n), lambda c, n: Conv1D(n, c)], ids=["Linear", "Conv1D"])
def test_columns_and_rows_of_a_layer(make, rotation):
    torch.manual_seed(0)
    layer, x, a = make(64, 64), random(5, 64), scales(64)
    nn.init.normal_(layer.bias)
    matrix = Matrix("layer", layer, turned=isinstance(layer, Conv1D))
    before = layer(x)
    with restored(layer):
        matrix.transform_columns(rotation, a)
        assert torch.allclose(layer(rotate_dense(x, rotation) / a), before, atol=1e-5)
    with restored(layer):
        matrix.transform_rows(rotation, a)
        assert torch.allclose(layer(x), rotate_dense(before, rotation) / a, atol=1e-5)
    assert torch.equal(layer(x), before)


def test_only_the_last_rows_of_joined_layers_change(rotation):
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 96), random(5, 16)
    before = layer(x)
    Matrix("layer", layer).transform_rows(rotation, None, first=32)
    assert torch.equal(layer(x)[:, :32], before[:, :32])
    assert torch.allclose(layer(x)[:, 32:], rotate_dense(before[:, 32:], rotation), atol=1e-6)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_readers_get_what_the_rounded_weight_of_the_norm_leaves(stored):
    torch.manual_seed(0)
    norm, reader, x = nn.RMSNorm(64), nn.Linear(64, 8), random(5, 64)
    norm.weight.data = 1 + 0.5 * random(64)
    before = reader(norm(x))
    found = Norm("norm", norm, 0.0, True, (Matrix("reader", reader),))
    found.transform(None, scales(64), stored)
    assert torch.equal(norm.weight, norm.weight.to(stored).float())
    assert torch.allclose(reader(norm(x)), before, atol=1e-5)


def test_a_weight_of_zero_stays_one_of_no_effect(rotation):
    torch.manual_seed(0)
    norm, reader, x = nn.RMSNorm(64), nn.Linear(64, 8), random(5, 64)
    norm.weight.data[3] = 0
    before = reader(norm(x))
    fold(
        Foldable((Norm("norm", norm, 0.0, True, (Matrix("reader", reader),)),)),
        Transforms(rotation, {"norm": scales(64)}),
    )
    assert torch.allclose(reader(norm(rotate_dense(x, rotation))), before, atol=1e-5)


def test_heads_that_share_values_share_their_transform():
    torch.manual_seed(0)
    values, after, x = nn.Linear(16, 64), nn.Linear(128, 8), random(5, 16)
    rotation = torch.linalg.qr(random(2, 32, 32))[0]

    def run():
        return after(values(x).view(5, 2, 1, 32).expand(5, 2, 2, 32).flatten(1))

    before, first = run(), values(x)
    pair = Pair(Matrix("values", values), Matrix("after", after), 64, repeats=2, head=32, rotates=True)
    a = scales(64)
    fold(Foldable(pairs=(pair,)), Transforms(pairs={"after": (rotation, a)}))
    assert torch.allclose(run(), before, atol=1e-5)
    assert torch.allclose(values(x), rotate_dense(first, rotation) / a, atol=1e-5)
