"""Naming modules by patterns."""

import pytest

from pairquant.spec.patterns import matches


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("model.lm_head", "lm_head", True),
        ("model.layers.0.mlp.gate", "mlp.gate", True),
        ("model.layers.0.mlp.gate", "model.layers.0.mlp.gate", True),
        ("model.layers.0.mlp.gate", "model.layers.0", True),
        ("visual.blocks.0.attn.qkv", "visual", True),
        ("model.layers.10.mlp.gate", "model.layers.1", False),
        ("model.layers.0.mlp.gate_proj", "gate", False),
        ("model.layers.0.mlp.gate_proj", "mlp", True),
        ("xlm_head", "lm_head", False),
        ("model.layers.0.mlp.gate", "", False),
        ("model.layers.0.mlp.gate", "re:model.*gate$", True),
        ("model.layers.0.mlp.gate", r"re:.*\.mlp\.", True),
        ("model.layers.0.mlp.gate", "re:mlp", False),
        ("model.layers.0.mlp.gate", "model.*gate", False),
    ],
)
def test_ignore_patterns(path, pattern, expected):
    assert matches(path, [pattern]) is expected


def test_one_matching_pattern_is_enough():
    assert matches("lm_head", ["visual", "lm_head"])
    assert not matches("lm_head", [])
