"""Where experts' tensors lie, and what they cost."""

import pytest

from pairquant.spec.experts import bits_per_weight, pool_of, shared_name
from pairquant.spec.linear import Spec


@pytest.mark.parametrize(
    ("path", "pool"),
    [
        ("model.layers.0.mlp.experts.12.gate_proj", "model.layers.0.mlp.experts.gate_up"),
        ("model.layers.0.mlp.experts.12.up_proj", "model.layers.0.mlp.experts.gate_up"),
        ("model.layers.0.mlp.experts.12.down_proj", "model.layers.0.mlp.experts.down"),
        ("layers.0.block_sparse_moe.experts.0.w1", "layers.0.block_sparse_moe.experts.gate_up"),
        ("layers.0.block_sparse_moe.experts.0.w2", "layers.0.block_sparse_moe.experts.down"),
    ],
)
def test_parts_of_one_input_share_a_pool(path, pool):
    assert pool_of(path) == pool
    assert shared_name(path, "theta") == f"{pool}_weight_theta"
    assert shared_name(path, "qweight") is None


def test_ordinary_linears_share_nothing():
    assert shared_name("model.norm", "theta") is None


def test_a_shared_transform_counts_once():
    layout = Spec(4, 32, 2).layout(64, 32)
    layouts = {f"experts.{number}.up_proj": layout for number in range(4)}
    pools = dict.fromkeys(layouts, "experts.gate_up")
    codes = 64 * 32 * 4 + 2 * 32 * (16 + 4)
    transform = 2 * 32 * 16 + 2 * 64 * 16 + 64 * 16
    assert layout.transform_bits() == transform
    assert bits_per_weight(layouts, {}) == (codes + transform) / (64 * 32)
    assert bits_per_weight(layouts, pools) == (4 * codes + transform) / (4 * 64 * 32)
