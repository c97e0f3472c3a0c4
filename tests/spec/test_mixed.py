"""Targets, candidates and plans: read from text and files, written and read again, and refused with the remedy."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairquant.spec.codes import SUPPORTED_BITS, SUPPORTED_GROUP_SIZES
from pairquant.spec.fields import Size
from pairquant.spec.linear import Spec
from pairquant.spec.mixed import Candidates, MixedPlan, Target, fingerprint
from pairquant.spec.options import QuantConfig
from pairquant.support.errors import ConfigError

SIZES = {f"model.layers.{i}.{name}": Size(128, 64) for i in range(2) for name in ("q_proj", "k_proj", "down_proj")}
specs = st.builds(
    Spec, st.sampled_from(SUPPORTED_BITS), st.sampled_from(SUPPORTED_GROUP_SIZES), st.integers(0, 16), st.booleans()
)


@pytest.mark.parametrize(
    ("text", "size"), [("4.2GB", 4_200_000_000), ("900 mb", 900_000_000), ("1GiB", 2**30), ("1500", 1500)]
)
def test_sizes_are_read_with_their_units(text, size):
    assert Target.of_size(text) == Target(size_bytes=size)


@pytest.mark.parametrize("text", ["4.2XB", "", "GB", "-1GB", "4,2GB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="allowed: a number and a unit such as 4.2GB"):
        Target.of_size(text)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"bits_per_weight": 3.5, "size_bytes": 10},
        {"bits_per_weight": -1},
        {"bits_per_weight": float("nan")},
        {"rotated": 1.5},
        {"rotated": "half"},
    ],
)
def test_a_target_is_one_positive_number(values):
    with pytest.raises(ConfigError):
        Target(**values)


def test_candidates_are_every_combination():
    found = Candidates.parse("bits:4|3,rotations:0|8").specs(Spec(6, 64, 4))
    assert found == [Spec(3, 64, 0), Spec(3, 64, 8), Spec(4, 64, 0), Spec(4, 64, 8)]
    assert [spec.bits for spec in Candidates().specs(Spec())] == list(SUPPORTED_BITS)
    assert len(Candidates.parse("all").specs(Spec())) == 6 * 3 * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits:7", "candidate bits is 7, allowed: 2, 3, 4, 5, 6, 8"),
        ("bit:4", "did you mean 'bits'"),
        ("bits", "'bits' is none of bits:A|B|…"),
        ("bits:3,bits:4", "'bits:4' is none of"),
        ("rotations:17", "candidate rotations is 17"),
    ],
)
def test_wrong_candidates_are_named(text, message):
    with pytest.raises(ConfigError) as caught:
        Candidates.parse(text)
    assert message in str(caught.value)


@given(specs, st.dictionaries(st.sampled_from([*SIZES, "down_proj", r"re:.*layers\.0\."]), specs))
def test_plans_are_read_as_they_were_written(default, layers):
    layers = {name: Spec(s.bits, s.group_size, s.rotations, default.symmetric) for name, s in layers.items()}
    plan = MixedPlan(default, layers, {"name": "m", **fingerprint(SIZES)}, {"any": "thing"})
    again = MixedPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert (again, again.measured) == (plan, plan.measured)
    assert list(again.layers) == list(layers), "the order counts"


def test_the_last_name_that_matches_counts():
    first, second, third = Spec(2), Spec(3), Spec(8)
    plan = MixedPlan(Spec(), {"model.layers.0": first, "down_proj": second, r"re:.*\.1\.down": third})
    assert plan.spec_of("model.layers.0.q_proj") == first
    assert plan.spec_of("model.layers.0.down_proj") == second
    assert plan.spec_of("model.layers.1.down_proj") == third
    assert plan.spec_of("model.layers.1.q_proj") == Spec()


def written(**changes):
    return {**MixedPlan(Spec(), {"q_proj": Spec(3)}, {"name": "Other", **fingerprint(SIZES)}).to_dict(), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairquant_plan": 9}, "pairquant_plan is 9, must be 1"),
        ({"layers": []}, "layers is list, must be an object"),
        (
            {"layers": {"q_proj": {"bitz": 3}}},
            "q_proj has 'bitz', allowed: bits, group_size, rotations; did you mean 'bits'",
        ),
        ({"layers": {"q_proj": {"bits": 7}}}, "q_proj: bits is 7"),
        ({"layers": {"re:(": {"bits": 3}}}, "is not a regular expression"),
        ({"default": 4}, "default is 4, must be an object"),
        ({"scales_alone": "no"}, "scales_alone is 'no', must be true or false"),
    ],
)
def test_entries_that_are_wrong_are_named(changes, message):
    with pytest.raises(ConfigError) as caught:
        MixedPlan.from_dict(written(**changes), "plan.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("plan.json")


def test_files_that_are_no_plans_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        MixedPlan.read(tmp_path / "missing.json")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        MixedPlan.read(tmp_path / "plan.json")


def test_a_plan_for_another_model_is_refused():
    plan = MixedPlan.from_dict(written(), "plan.json")
    plan.require_for(SIZES)
    with pytest.raises(ConfigError, match=r"plan.json was made for Other, which has 6 layers .* this model has 5"):
        plan.require_for(dict(list(SIZES.items())[:-1]))
    by_hand = MixedPlan.from_dict(
        {"pairquant_plan": 1, "default": {}, "layers": {"dwn_proj": {"bits": 3}}}, "plan.json"
    )
    with pytest.raises(ConfigError, match="names 'dwn_proj', which is no layer of this model"):
        by_hand.require_for(SIZES)


def test_options_take_the_plans_default_and_no_second_size():
    plan = MixedPlan(Spec(3, 64, 2, True), {})
    config = QuantConfig(plan=plan)
    assert config.spec == plan.default
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="both a plan and a target"):
        QuantConfig(plan=plan, target=Target(3.5))
    bare = MixedPlan(Spec(4, 64, 8), {"q_proj": Spec(4, 64, 0)}, scales_alone=False)
    config = QuantConfig(plan=MixedPlan.from_dict(json.loads(json.dumps(bare.to_dict()))))
    assert config.plan == bare
    assert not config.recipe.scales_alone
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with_target = QuantConfig(target=Target(size_bytes=10**9), candidates="bits:3|4")
    assert QuantConfig.from_dict(json.loads(json.dumps(with_target.to_dict()))) == with_target
