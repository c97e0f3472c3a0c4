"""Plans of a size: made, measured once for several sizes, followed by quantize, stored, and refused before any work."""

import json

import pytest
import torch
from killing import content
from safetensors.torch import load_file
from test_families import make_source
from tiny_models import TEXT, save_tiny

import pairquant
from pairquant.checkpoint.journal import Journal
from pairquant.checkpoint.read import Checkpoint, ModelFiles
from pairquant.jobs.outcome import PLAN_FILE
from pairquant.jobs.plan import Silent, plan
from pairquant.jobs.quantize import Silent as SilentJob
from pairquant.optimize.sensitivity import Measurement
from pairquant.spec.experts import pool_of
from pairquant.spec.linear import Spec
from pairquant.spec.mixed import MixedPlan, Target
from pairquant.spec.recipe import recipe_with
from pairquant.support.errors import ConfigError

OPTIONS = {
    "preset": "quick", "group_size": 32, "rotations": 2, "samples": 4, "seq_len": 32, "calibration": (str(TEXT),),
}  # fmt: skip


def config(**options):
    return pairquant.QuantConfig(**{**OPTIONS, **options})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("plan") / "source")


@pytest.fixture(scope="module")
def made(source):
    return plan(source, config(target=Target(5.0)), device="cpu")


def stored(output):
    checkpoint = Checkpoint.open(ModelFiles.find(str(output)))
    return checkpoint, {path: checkpoint.config.spec_of(path) for path in checkpoint.stored.linears()}


def test_a_plan_uses_its_size_and_is_predicted_to_do_better_than_one_width(made):
    assert 4.7 < made.bits_per_weight <= 5.0
    assert len({spec.bits for spec in made.plan.layers.values()}) > 1
    assert made.uniform is not None
    assert made.choice.divergence < made.uniform.divergence


@pytest.fixture(scope="module")
def few(source):
    return plan(source, config(rotations="auto"), device="cpu")


def test_of_few_transforms_those_are_left_out_that_buy_least(source, few, tmp_path):
    assert (few.choice.rotated, len(few.choice.units)) == (5, 8), "two thirds, rounded down"
    assert {spec.bits for spec in few.plan.layers.values()} == {4}
    assert few.choice.divergence >= few.uniform.divergence
    (tmp_path / "plan.json").write_text(json.dumps(few.plan.to_dict()))
    for name, options in {"by-plan": {"plan": tmp_path / "plan.json"}, "at-once": {"rotations": "auto"}}.items():
        pairquant.quantize(source, tmp_path / name, config(**options), device="cpu")
        checkpoint, specs = stored(tmp_path / name)
        assert specs == few.plan.layers
        for path in specs:
            packed = checkpoint.packed(path)
            assert bool((packed["channel_scales"] == 1).all()) == (specs[path].rotations == 0)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("by-plan", "at-once")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_embeddings_keep_their_transform(source, tmp_path):
    options = {"rotations": "auto", "target": Target(4.5), "head_bits": 4, "embedding_bits": 4, "samples": 4}
    pairquant.quantize(source, tmp_path / "out", config(**options), device="cpu")
    checkpoint, specs = stored(tmp_path / "out")
    apart = [path for path in specs if "layers" not in path]
    assert len(apart) == 2
    for path in apart:
        assert specs[path].rotations == 8
        assert not (checkpoint.packed(path)["channel_scales"] == 1).all()


def test_trainings_leave_what_has_no_transform_so(source, few, tmp_path):
    options = {"plan": MixedPlan.from_dict(few.plan.to_dict()), "recipe": recipe_with("best", ["refit.epochs=1"], 1)}
    pairquant.quantize(source, tmp_path / "out", config(**options), device="cpu")
    checkpoint, specs = stored(tmp_path / "out")
    bare = [checkpoint.packed(path) for path, spec in specs.items() if not spec.rotations]
    assert bare
    assert all((packed["channel_scales"] == 1).all() for packed in bare)


def test_measurements_with_and_without_scales_alone_are_not_mixed_up(source, few):
    with pytest.raises(
        ConfigError, match="measured with --rotations auto, and this plan is made without it. Leave out --measured"
    ):
        plan(source, config(target=Target(5.0), candidates="bits:4,rotations:0|8"), device="cpu", measured=few.plan)


def test_measurements_serve_other_sizes(source, made, monkeypatch):
    direct = plan(source, config(target=Target(4.5)), device="cpu")
    monkeypatch.setattr(Measurement, "run", None)
    written = MixedPlan.from_dict(json.loads(json.dumps(made.plan.to_dict())))
    reused = plan(source, config(target=Target(4.5)), device="cpu", measured=written)
    assert reused.plan.layers == direct.plan.layers
    assert reused.bits_per_weight <= 4.5
    wider = config(target=Target(4.5), candidates="bits:3|4,group_size:64")
    with pytest.raises(ConfigError, match=r"has no measurement of .* at .*64"):
        plan(source, wider, device="cpu", measured=written)
    empty = {"forms": [], "divergences": {}, "readers": []}
    with pytest.raises(ConfigError, match="holds no measurements"):
        plan(source, config(target=Target(4.5)), device="cpu", measured=MixedPlan(Spec(), {}, measured=empty))


def test_quantize_follows_a_plan_and_one_that_was_edited(source, made, tmp_path):
    entries = made.plan.to_dict()
    down = "model.layers.1.mlp.down_proj"
    entries["layers"][down] = {"bits": 8, "group_size": 64, "rotations": 1}
    (tmp_path / "plan.json").write_text(json.dumps(entries))
    pairquant.quantize(source, tmp_path / "out", config(plan=tmp_path / "plan.json"), device="cpu")
    checkpoint, specs = stored(tmp_path / "out")
    assert specs == {**made.plan.layers, down: Spec(8, 64, 1)}
    assert checkpoint.config.spec == made.plan.default
    kept = MixedPlan.read(tmp_path / "out" / PLAN_FILE)
    assert kept.layers == specs
    assert pairquant.inspect(tmp_path / "out").linears


@pytest.mark.parametrize("target", [{"bits_per_weight": 5.0}, {"size_bytes": 420_000}], ids=str)
def test_quantize_keeps_within_a_target(source, tmp_path, target):
    heard = []

    class Heard(SilentJob):
        def planned(self, result):
            heard.append(result)

    summary = pairquant.quantize(source, tmp_path / "out", config(target=target), device="cpu", progress=Heard())
    (result,) = heard
    assert stored(tmp_path / "out")[1] == result.plan.layers
    assert summary.bits_per_weight == pytest.approx(result.bits_per_weight, rel=1e-6)
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little") + 8
    assert weights - header == result.size_bytes
    assert result.size_bytes <= target.get("size_bytes", 10**9)


def test_experts_of_a_block_have_one_form_and_their_transform_counts_once(tmp_path):
    source = make_source("Qwen3-MoE", tmp_path / "source")
    heard = []

    class Heard(SilentJob):
        def planned(self, result):
            heard.append(result)

    summary = pairquant.quantize(source, tmp_path / "out", config(target=Target(5.5)), device="cpu", progress=Heard())
    (result,) = heard
    assert summary.bits_per_weight == pytest.approx(result.bits_per_weight, rel=1e-6)
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little") + 8
    assert weights - header == result.size_bytes
    _, specs = stored(tmp_path / "out")
    assert {path: result.plan.spec_of(path) for path in specs} == specs
    pools = {}
    for path, spec in specs.items():
        if ".experts." in path:
            pools.setdefault(pool_of(path), set()).add(spec)
    assert len(pools) == 4
    assert all(len(found) == 1 for found in pools.values())


def test_a_stopped_run_goes_on_with_the_plan_it_began_with(source, tmp_path, monkeypatch):
    class Stop(SilentJob):
        def block(self, result):
            raise KeyboardInterrupt

    target = config(target=Target(5.0))
    pairquant.quantize(source, tmp_path / "whole", target, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        pairquant.quantize(source, tmp_path / "out", target, device="cpu", progress=Stop())
    assert (Journal.beside(tmp_path / "out") / PLAN_FILE).is_file()
    monkeypatch.setattr(Measurement, "run", None)
    with pytest.raises(ConfigError, match=r"target.bits_per_weight: 5.0 then, 4.5 now"):
        pairquant.quantize(source, tmp_path / "out", config(target=Target(4.5)), device="cpu")
    pairquant.quantize(source, tmp_path / "out", target, device="cpu")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": Target(2.0)}, "the target is 2 bits per weight; with these forms the smallest possible is"),
        ({"target": Target(size_bytes=1000)}, "the target is 0.0 MB; with these forms the smallest possible is"),
        (
            {"target": Target(5.0), "overrides": ("q_proj=bits:8", "k_proj=bits:3")},
            "the overrides leave them none in common",
        ),
    ],
)
def test_what_cannot_be_reached_is_refused_before_measuring(source, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(Measurement, "run", None)
    for run in (
        lambda: plan(source, config(**options), device="cpu", progress=Silent()),
        lambda: pairquant.quantize(source, tmp_path / "out", config(**options), device="cpu"),
    ):
        with pytest.raises(ConfigError) as caught:
            run()
        assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_plans_that_do_not_suit_the_model_are_refused(source, made, tmp_path):
    q, k = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
    for layers, message in (
        (
            {q: Spec(8, 32, 2), k: Spec(4, 32, 2)},
            f"{q}, {k}, .* run as one layer and need one form; the plan gives them q_proj: 8",
        ),
        ({"model.layers.7.mlp.up_proj": Spec(8, 32, 2)}, "which is no layer of this model"),
    ):
        with pytest.raises(ConfigError, match=message):
            pairquant.quantize(source, tmp_path / "out", config(plan=MixedPlan(Spec(4, 32, 2), layers)), device="cpu")
    other = save_tiny(tmp_path / "other", "phi3")
    with pytest.raises(ConfigError, match=r"was made for .*source, which has 14 layers"):
        pairquant.quantize(other, tmp_path / "out", config(plan=made.plan), device="cpu")
