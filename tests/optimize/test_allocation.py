"""Forms are chosen as well as by trying all of them; what runs together gets one form."""

from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from pairquant.models.planning import plan_model
from pairquant.optimize.allocation import (
    Form,
    Unit,
    allocate,
    forms_of,
    mixed_plan,
    require_reachable,
    uniform,
    units_of,
)
from pairquant.spec.linear import Spec
from pairquant.spec.mixed import Candidates, Target
from pairquant.spec.options import QuantConfig
from pairquant.support.errors import ConfigError

forms = st.lists(
    st.tuples(st.integers(1, 40), st.floats(0, 1, allow_subnormal=False)),
    min_size=1,
    max_size=4,
    unique_by=lambda f: f[0],
)


def unit(number, of):
    return Unit(
        (f"layers.{number}.q",), None, 8, tuple(Form(Spec(2 + i), bits, cost) for i, (bits, cost) in enumerate(of))
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(forms, min_size=1, max_size=4), st.integers(4, 120))
def test_the_choice_is_the_best_of_all(offered, budget):
    units = [unit(number, of) for number, of in enumerate(offered)]
    fitting = [c for c in product(*offered) if sum(bits for bits, _ in c) <= budget]
    assume(fitting)
    choice = allocate(units, budget)
    assert choice.bits <= budget
    assert choice.divergence <= min(sum(cost for _, cost in c) for c in fitting) * (1 + 1e-4) + 1e-9


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5), st.integers(0, 5), st.integers(8, 60)
)
def test_of_few_transforms_the_choice_is_the_best(costs, rotated, budget):
    units = [
        Unit((f"layers.{i}.q",), None, 8, (Form(Spec(rotations=0), 8, bare), Form(Spec(rotations=8), 10, turned)))
        for i, (bare, turned) in enumerate(costs)
    ]
    every = [
        sum(cost[turned] for cost, turned in zip(costs, choice, strict=True))
        for choice in product((0, 1), repeat=len(costs))
        if sum(choice) <= rotated and 8 * len(costs) + 2 * sum(choice) <= budget
    ]
    assume(every)
    choice = allocate(units, budget, rotated)
    assert choice.rotated <= rotated
    assert choice.bits <= budget
    assert choice.divergence <= min(every) * (1 + 1e-4) + 1e-9


def test_more_inputs_than_may_be_cannot_do_without_a_transform():
    turned = Unit(("layers.0.q",), None, 8, (Form(Spec(rotations=8), 8),))
    either = Unit(("layers.1.q",), None, 8, (Form(Spec(rotations=0), 8), Form(Spec(rotations=8), 8)))
    require_reachable([turned, either], 16, Target(rotated=0.5), 0)
    with pytest.raises(ConfigError, match=r"2 inputs of 3 cannot do without one.* Add rotations:0 to --candidates"):
        require_reachable([turned, turned, either], 24, Target(rotated=0.5), 0)


def test_sizes_out_of_reach_are_refused_with_the_limits():
    units = [unit(0, [(16, 1.0), (32, 0.1)]), unit(1, [(24, 1.0)])]
    require_reachable(units, 40, Target(2.5), 0)
    with pytest.raises(
        ConfigError, match=r"target is 2 bits per weight.* smallest possible is 2\.500 and the largest 3\.500"
    ):
        require_reachable(units, 32, Target(2.0), 0)
    with pytest.raises(ConfigError, match=r"smallest possible is 1.00 GB"):
        require_reachable(units, 10**10, Target(size_bytes=2_250_000_000), 10**9 - 5)


def planned(candidates=None, overrides=(), **options):
    model = tiny_model()
    config = QuantConfig(group_size=64, overrides=overrides, candidates=candidates or Candidates(), **options)
    plan, blocks = plan_model(model, config)
    sites = {path: site for block in blocks for path, site in block.sites.items()}
    return plan, sites, forms_of(plan, config)


READERS = [
    tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkv"),
    tuple(f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up")),
]


def test_weights_that_run_together_are_one_unit():
    plan, sites, chosen = planned()
    units = units_of(chosen, plan.layouts, sites, READERS, {path: {Spec(3, 64): 1.0} for path in chosen})
    joined = [unit for unit in units if len(unit.paths) > 1]
    assert [unit.paths for unit in joined] == READERS
    assert joined[0].forms[1].divergence == 3.0
    bits = sum(plan.layouts[path].stored_bits() for path in READERS[0])
    assert joined[0].forms[2].bits == bits, "at the plan's own form"
    assert sum(unit.weights for unit in units) == sum(s.size.in_features * s.size.out_features for s in sites.values())


def test_overrides_fix_what_they_name_and_must_leave_a_form_in_common():
    plan, sites, chosen = planned(overrides=("down_proj=bits:8",))
    assert {spec.bits for spec in chosen["model.layers.1.mlp.down_proj"]} == {8}
    plan, sites, chosen = planned(overrides=("q_proj=bits:8", "k_proj=bits:4"))
    with pytest.raises(ConfigError, match=r"q_proj, .*k_proj, .*v_proj run as one layer"):
        units_of(chosen, plan.layouts, sites, READERS, {})


def test_forms_that_a_weight_cannot_have_are_left_out():
    _, _, chosen = planned(Candidates.parse("bits:3|4,group_size:32|128,rotations:0|8"))
    assert {s.group_size for s in chosen["model.layers.0.self_attn.q_proj"]} == {32, 128}, "it reads 128 channels"
    assert {s.group_size for s in chosen["model.layers.0.mlp.down_proj"]} == {32}, "it reads 192 channels"
    _, _, turned = planned(Candidates.parse("bits:3|4,rotations:0|8"), rotations=0)
    assert {s.rotations for of in turned.values() for s in of} == {0, 8}, "whatever the default is"
    _, _, without = planned(preset="rtn")
    assert {s.rotations for of in without.values() for s in of} == {0}


def test_one_form_for_all_leaves_what_an_override_fixed_as_it_would_be():
    free = Unit(("a",), None, 8, tuple(Form(Spec(4, rotations=k), 8, cost) for k, cost in ((0, 1.0), (8, 0.5))))
    fixed = Unit(("b",), None, 8, tuple(Form(Spec(8, rotations=k), 16, cost) for k, cost in ((0, 1.5), (8, 0.1))))
    best = uniform([free, fixed], 100)
    assert best is not None
    assert best.divergence == pytest.approx(0.6)


def test_a_plan_names_every_layer_and_its_default_is_the_most_common_form():
    units = [unit(0, [(16, 1.0), (32, 0.1)]), unit(1, [(16, 0.2), (32, 0.1)]), unit(2, [(16, 0.2), (32, 0.1)])]
    plan = mixed_plan(allocate(units, 64))
    assert plan.default == Spec(2)
    assert {name: spec.bits for name, spec in plan.layers.items()} == {
        "layers.0.q": 3,
        "layers.1.q": 2,
        "layers.2.q": 2,
    }
    assert mixed_plan(allocate(units, 64), rotations=4).default == Spec(2, rotations=4)
    best = uniform(units, 64)
    assert best is not None
    assert (best.bits, best.divergence) == (48, pytest.approx(1.4))
    assert uniform(units, 10) is None
