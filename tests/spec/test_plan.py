"""The plan: defaults, overrides, what does not fit, and the reason of every exception."""

import pytest

from pairquant.spec.checkpoint import CheckpointConfig
from pairquant.spec.fields import Size
from pairquant.spec.linear import Spec
from pairquant.spec.options import QuantConfig
from pairquant.spec.plan import plan_for
from pairquant.support.errors import ConfigError

SIZES = {
    f"model.layers.{i}.{name}": size
    for i in range(2)
    for name, size in (("q_proj", Size(128, 64)), ("down_proj", Size(192, 128, True)))
}


def plan(**options):
    return plan_for(QuantConfig(**{"group_size": 64, **options}), SIZES, {"lm_head": "--ignore lm_head"})


def test_without_overrides_every_weight_has_the_default():
    found = plan(bits=3)
    assert {layout.spec for layout in found.layouts.values()} == {Spec(3, 64, 8)} == {found.default}
    assert found.layouts["model.layers.1.down_proj"] == Spec(3, 64, 8).layout(192, 128, True)
    assert found.exceptions == {}
    assert found.plain == {"lm_head": "--ignore lm_head"}


def test_the_last_override_that_matches_wins_and_starts_from_the_default():
    found = plan(overrides=("down_proj=bits:8,rotations:0", "model.layers.1=group_size:32", "q_proj=bits:4"))
    assert {path: layout.spec for path, layout in found.layouts.items()} == {
        "model.layers.0.q_proj": Spec(4, 64, 8),
        "model.layers.0.down_proj": Spec(8, 64, 0),
        "model.layers.1.q_proj": Spec(4, 64, 8),
        "model.layers.1.down_proj": Spec(4, 32, 8),
    }
    assert set(found.exceptions) == {"model.layers.0.down_proj", "model.layers.1.down_proj"}
    assert found.reasons["model.layers.0.down_proj"] == "--override down_proj=bits:8,rotations:0"
    assert found.reasons["model.layers.1.down_proj"] == "--override model.layers.1=group_size:32"


def test_an_override_that_names_nothing_is_refused_with_a_guess():
    with pytest.raises(ConfigError, match=r"'down_porj=bits:8' names no weight.*did you mean 'down_proj'"):
        plan(overrides=("down_porj=bits:8",))


def test_automatic_group_sizes_look_only_at_the_weights_they_are_for():
    assert plan(group_size="auto").default.group_size == 64
    assert plan(group_size="auto", overrides=("down_proj=group_size:32",)).default.group_size == 128


def test_presets_without_a_transform_have_no_rotations_whatever_an_override_says():
    found = plan(preset="rtn", overrides=("q_proj=rotations:4,bits:8",))
    assert found.layouts["model.layers.0.q_proj"].spec == Spec(8, 64, 0)


def test_weights_that_do_not_fit_are_listed_with_the_remedies():
    with pytest.raises(ConfigError) as caught:
        plan(group_size=128)
    said = str(caught.value)
    assert "2 of 4 linear layers do not fit" in said
    assert "2 × in_features 192 is not a multiple of group size 128" in said
    assert "model.layers.1.down_proj" in said
    assert "--group-size 64, or leave these layers as they are with --ignore down_proj" in said


def test_outputs_that_do_not_fill_words_are_no_matter_of_the_group_size():
    with pytest.raises(ConfigError) as caught:
        plan_for(QuantConfig(group_size=64), {"a.gate": Size(128, 4)}, {})
    assert "--group-size" not in str(caught.value)
    assert "--ignore gate" in str(caught.value)


def test_the_plan_is_what_the_checkpoint_says():
    found = plan(overrides=("layers.0.q_proj=bits:6", "down_proj=group_size:32"))
    config = CheckpointConfig.from_dict(CheckpointConfig.of_plan(found).to_dict())
    for path, layout in found.layouts.items():
        assert config.layout(path, layout.in_features, layout.out_features, layout.bias) == layout
