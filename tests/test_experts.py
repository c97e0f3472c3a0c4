"""Models with experts from end to end: names kept, runs resumed, the original's layout, what is said and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from families import DENSE, FAMILIES
from original_layout import write_original
from safetensors.torch import load_file, save_file
from test_families import log_probabilities, make_source
from tiny_models import TEXT, byte_tokenizer
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import pairquant
from pairquant.checkpoint.headers import StoredTensors
from pairquant.evaluation.quality import measure
from pairquant.jobs.quantize import Silent
from pairquant.models.blocks import enter, find_blocks
from pairquant.models.planning import plan_model
from pairquant.optimize import streams
from pairquant.optimize.walk import Walk
from pairquant.spec.experts import bits_per_weight
from pairquant.spec.recipe import PRESETS, recipe_with
from pairquant.support.errors import CheckpointError, ConfigError

OPTIONS = {
    "preset": "quick",
    "group_size": 32,
    "rotations": 2,
    "samples": 2,
    "seq_len": 64,
    "calibration": (str(TEXT),),
}


class Heard(Silent):
    def __init__(self):
        self.notices = []

    def notice(self, text):
        self.notices.append(text)


def quantize(source, output, progress=None, **options):
    config = pairquant.QuantConfig(**{**OPTIONS, **options})
    return pairquant.quantize(source, output, config, device="cpu", progress=progress)


@pytest.fixture(scope="module", params=["Mixtral", "gpt-oss"])
def made(request, tmp_path_factory):
    """A source with single experts under other names, and one with all in one tensor, with biases; their checkpoints."""
    root = tmp_path_factory.mktemp("experts")
    source = make_source(request.param, root / "source")
    heard = Heard()
    quantize(source, root / "packed", heard)
    return root, heard.notices


def test_the_result_is_near_and_smaller(made):
    root, _ = made
    expected, found = log_probabilities(root / "source"), log_probabilities(root / "packed")
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 0.02
    assert pairquant.inspect(root / "packed").checkpoint.bits_per_weight() < 6


def test_codes_are_stored_by_expert_and_transforms_once(made):
    root, _ = made
    stored = StoredTensors.of_directory(root / "packed")
    thetas = [name for name in stored.fields if "expert" in name and name.endswith("theta")]
    codes = [name for name in stored.fields if "expert" in name and name.endswith("qweight")]
    assert (len(thetas), len(codes)) == (2 * 2, 2 * 4 * 3)
    assert all(name.endswith(("experts.gate_up_weight_theta", "experts.down_weight_theta")) for name in thetas)


def test_saving_again_and_exporting_keep_the_names(made, tmp_path):
    root, _ = made
    model = AutoModelForCausalLM.from_pretrained(root / "packed", dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    before, after = (StoredTensors.of_directory(d) for d in (root / "packed", tmp_path / "again"))
    assert set(before.fields) == set(after.fields)
    assert all(torch.equal(before.load(name), after.load(name)) for name in before.packed_names())
    pairquant.export(root / "packed", tmp_path / "plain", "fp32")
    source, plain = (StoredTensors.of_directory(d).fields for d in (root / "source", tmp_path / "plain"))
    assert {name: field.shape for name, field in source.items()} == {name: field.shape for name, field in plain.items()}
    torch.testing.assert_close(
        log_probabilities(tmp_path / "plain"), log_probabilities(root / "packed"), rtol=0, atol=1e-4
    )


def test_a_stopped_run_continues_to_the_same_bytes(made, tmp_path):
    root, _ = made

    class Stops(Silent):
        def block(self, result):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(root / "source", tmp_path / "packed", Stops())
    quantize(root / "source", tmp_path / "packed")
    file = "model.safetensors"
    assert (tmp_path / "packed" / file).read_bytes() == (root / "packed" / file).read_bytes()


def test_a_stopped_run_of_trained_blocks_continues_to_the_same_bytes(tmp_path):
    source = make_source("Qwen3-MoE", tmp_path / "source")

    class Stops(Silent):
        def block(self, result):
            raise KeyboardInterrupt

    options = {"preset": "best", "samples": 8, "recipe": replace(PRESETS["best"], steps=5)}
    quantize(source, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "packed", Stops(), **options)
    quantize(source, tmp_path / "packed", **options)
    first, second = (tmp_path / name / "model.safetensors" for name in ("whole", "packed"))
    assert first.read_bytes() == second.read_bytes()


def test_rounding_without_text_works_too(made, tmp_path):
    root, _ = made
    quantize(root / "source", tmp_path / "rtn", preset="rtn")
    assert log_probabilities(tmp_path / "rtn").isfinite().all()


def test_what_stays_plain_is_said_with_its_share(made):
    _, notices = made
    assert any("stays plain in 2 places, 0.4% of the blocks' weights" in text for text in notices)


def test_experts_with_few_tokens_are_said(tmp_path):
    heard = Heard()
    quantize(make_source("Qwen3-MoE", tmp_path / "source"), tmp_path / "packed", heard, samples=1, seq_len=32)
    assert any("of 8 experts got fewer tokens than they have input channels" in text for text in heard.notices)
    lines = [json.loads(line) for line in (tmp_path / "packed" / "pairquant.jsonl").read_text().splitlines()]
    tokens = [entry["tokens"] for entry in lines if entry["event"] == "block"]
    assert [sum(counts) for entry in tokens for counts in entry.values()] == [2 * 32, 2 * 32]


def test_all_tokens_for_every_expert(tmp_path):
    source = make_source("Qwen3-MoE", tmp_path / "source")
    for name, all_experts in (("routed", False), ("all", True)):
        heard = Heard()
        quantize(source, tmp_path / name, heard, all_experts=all_experts)
        short = [text for text in heard.notices if "fewer tokens than they have input channels" in text]
        assert len(short) == (0 if all_experts else 1)
        assert all("--all-experts" in text for text in short)
    lines = [json.loads(line) for line in (tmp_path / "all" / "pairquant.jsonl").read_text().splitlines()]
    tokens = [list(entry["tokens"].values()) for entry in lines if entry["event"] == "block"]
    assert tokens == [[[2 * 64] * 4]] * 2
    recorded = [json.loads((tmp_path / name / "pairquant.json").read_text())["config"] for name in ("routed", "all")]
    assert ["all_experts" in config for config in recorded] == [False, True]
    assert pairquant.QuantConfig.from_dict(recorded[1]).all_experts
    expected, found = log_probabilities(source), log_probabilities(tmp_path / "all")
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 0.02


def test_the_moments_of_all_tokens_are_those_computed_by_hand(monkeypatch):
    """The walk's moments of a block, in two micro-batches, against products of what each expert reads."""
    monkeypatch.setattr(streams, "MICRO_BATCH_TOKENS", 128)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES["Qwen3-MoE"].build()).eval().float()
    config = pairquant.QuantConfig(**OPTIONS | {"samples": 4}, all_experts=True)
    tokens = torch.randint(3, 259, (4, 64), generator=torch.Generator().manual_seed(1))
    module, seen = model.model.layers[0].mlp.experts, []
    with torch.no_grad():
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
        model(tokens)
        handle.remove()
        x = seen[0]
        gate_up = [x @ weight.T for weight in module.gate_up_proj]
        inner = [torch.nn.functional.silu(y[:, :32]) * y[:, 32:] for y in gate_up]
        plan, blocks = plan_model(model, config)
        walk = Walk(model, blocks, plan, config, torch.device("cpu"), tokens)
        moments, uncalled = walk._moments(0, blocks[0], walk._start(tokens))
    assert not uncalled
    outer, *down = [m for m in moments if "experts" in m.readers[0]]
    assert (len(outer.readers), len(down)) == (8, 4)
    torch.testing.assert_close(outer.hessian, x.T @ x, rtol=1e-4, atol=1e-4)
    for found, y in zip(down, inner, strict=True):
        assert found.tokens == 256
        torch.testing.assert_close(found.hessian, y.T @ y, rtol=1e-3, atol=1e-7)


def test_tensors_that_the_class_does_not_use_travel(tmp_path):
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save

    source = make_source("Qwen3-MoE", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["mtp.fc.weight"] = torch.randn(64, 128)
    save(tensors, source / "model.safetensors", {"format": "pt"})
    heard = Heard()
    quantize(source, tmp_path / "packed", heard)
    stored = StoredTensors.of_directory(tmp_path / "packed")
    assert torch.equal(stored.load("mtp.fc.weight"), tensors["mtp.fc.weight"])
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert "mtp.fc" in config["modules_to_not_convert"]
    assert any("does not use are kept as they are: mtp.fc.weight" in text for text in heard.notices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": ("re:.*experts.0.up_proj=bits:8",)}, "would be stored otherwise than the other experts"),
        ({"ignore": ("lm_head", "re:.*experts.1.down_proj")}, "cannot be left plain alone"),
        ({"ignore": ("lm_head", "re:.*experts.*"), "all_experts": True}, "no experts that will be quantized"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(options, message, tmp_path):
    source = make_source("Qwen3-MoE", tmp_path / "source")
    with pytest.raises(ConfigError, match=message):
        quantize(source, tmp_path / "packed", **options)
    assert not (tmp_path / "packed").exists()


def trained(model, preset, tokens, **settings):
    """Quantize the model in place by a short recipe of the preset; the results of its blocks."""
    recipe = PRESETS[preset]
    recipe = replace(recipe, steps=20, shrinks=(1.0, 0.9))
    if recipe.training is not None:
        rates = {"weight_rate": 2e-4, "quantizer_rate": 1e-5, "validation_samples": 0}
        recipe = replace(recipe, training=replace(recipe.training, epochs=3, weight_epochs=3, batch=4, **rates))
    if recipe.refit is not None:
        recipe = replace(recipe, refit=replace(recipe.refit, epochs=3, batch=4))
    config = pairquant.QuantConfig(group_size=32, rotations=2, preset=preset, recipe=recipe, **settings)
    plan, blocks = plan_model(model, config)
    with torch.no_grad():
        return list(Walk(model, blocks, plan, config, torch.device("cpu"), tokens).run())


def routed_model(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family].build()).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(std=0.2)  # experts weigh as much as the rest of a block
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 259, (8, 48), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("preset", ["best", "paper"])
@pytest.mark.parametrize("family", ["Qwen3-MoE", "gpt-oss", "Nemotron-H"])
def test_block_wise_training_lowers_the_loss_that_the_block_then_has(family, preset, tokens):
    """Training computes with experts' weights put together anew; the block with its decoded weights must answer the same."""
    model = routed_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    original = routed_model(family)
    blocks = find_blocks(original)
    number = next(i for i, block in enumerate(blocks) if any(site.pool for site in block.sites.values()))
    results = trained(model, preset, tokens)
    result = results[number]
    last = {"best": 3, "paper": 2}[preset]
    losses = [entry["validation"] for entry in result.history if entry["stage"] == last]
    assert min(losses) < losses[0]
    entry, found = enter(original, blocks, tokens, 8), enter(model, find_blocks(model), tokens, 8)
    x, y = entry.hidden[0], found.hidden[0]
    with torch.no_grad():
        for i in range(number + 1):
            x = entry.calls[i].run(blocks[i].module, x)
            y = found.calls[i].run(model.get_submodule(blocks[i].path), y)
    kind = torch.nn.functional.smooth_l1_loss
    assert kind(y, x).item() == pytest.approx(min(losses), rel=0.01)
    routers = [name for name in before if name.rpartition(".")[0].endswith((".gate", ".router"))]
    assert routers
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in routers)


def test_a_refit_trains_experts_and_keeps_their_codes(tokens):
    first, second = (trained(routed_model("Qwen3-MoE"), preset, tokens)[0].packed for preset in ("fast", "best"))
    experts = [path for path in first if ".experts." in path]
    assert len(experts) == 12
    changed = 0
    for path in experts:
        for name in ("qweight", "qzeros", "pairs"):
            assert torch.equal(first[path][name], second[path][name])
        changed += not torch.equal(first[path]["scales"], second[path]["scales"])
    assert changed == 12
    for part in ("up_proj", "down_proj"):  # one transform for all experts, trained as one
        thetas = [second[path]["theta"] for path in experts if path.endswith(part)]
        assert all(torch.equal(thetas[0], theta) for theta in thetas)
        assert not torch.equal(thetas[0], first[experts[0 if part == "up_proj" else 2]]["theta"])


def test_a_refit_ends_nearer_to_the_original_than_rounding_alone(tokens):
    original, held_out = routed_model("Qwen3-MoE"), tokens.flip(1)
    found = {}
    for preset in ("fast", "best"):
        model = routed_model("Qwen3-MoE")
        trained(model, preset, torch.cat([tokens, tokens.roll(7, 1), tokens.roll(19, 0)]))
        found[preset] = measure(model, held_out, original).kl
    assert found["best"] < 1.02 * found["fast"]


@pytest.mark.parametrize("preset", ["best", "paper"])
@pytest.mark.parametrize("family", ["Qwen3-MoE", "gpt-oss", "Nemotron-H", "Phi-3.5-MoE"])
def test_experts_are_trained_in_bfloat16(family, preset, tokens):
    model = routed_model(family).bfloat16()
    results = trained(model, preset, tokens, compute="bfloat16")
    losses = [entry["validation"] for result in results for entry in result.history]
    assert losses
    assert torch.tensor(losses).isfinite().all()
    assert all(0 < error < 0.5 for result in results for error in result.errors.values())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("preset", ["best", "paper"])
def test_blocks_with_plain_experts_are_trained_in_bfloat16(preset, tokens):
    model = routed_model("Qwen3-MoE").bfloat16()
    before = model.model.layers[0].mlp.experts.down_proj.clone()
    results = trained(model, preset, tokens, compute="bfloat16", ignore=("lm_head", "re:.*experts.*"))
    assert all(result.history for result in results)
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj, before)


@pytest.mark.parametrize("preset", ["best", "paper"])
def test_trained_experts_are_stored_under_the_sources_names(preset, tmp_path):
    source = make_source("Mixtral", tmp_path / "source")
    training = {"validation_samples": 2} if preset == "paper" else {}
    recipe = recipe_with(preset, [f"training.{name}={value}" for name, value in training.items()])
    quantize(source, tmp_path / "packed", preset=preset, recipe=recipe, samples=8)
    stored = StoredTensors.of_directory(tmp_path / "packed")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.qweight" in stored.fields
    norms = {name for name in StoredTensors.of_directory(source).fields if "norm" in name}
    assert norms <= set(stored.fields)
    expected, found = log_probabilities(source), log_probabilities(tmp_path / "packed")
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 0.02


def test_experts_can_be_left_plain_or_get_other_bits(tmp_path):
    source = make_source("Qwen3-MoE", tmp_path / "source")
    quantize(source, tmp_path / "plain", ignore=("lm_head", "re:.*experts.*"))
    kept, before = (StoredTensors.of_directory(d) for d in (tmp_path / "plain", source))
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    assert torch.equal(kept.load(name), before.load(name))
    assert log_probabilities(tmp_path / "plain").isfinite().all()
    quantize(source, tmp_path / "wide", overrides=("re:.*experts.*=bits:8",))
    found = pairquant.inspect(tmp_path / "wide").checkpoint
    assert found.layout("model.layers.0.mlp.experts.0.up_proj").bits == 8
    assert found.layout("model.layers.0.self_attn.q_proj").bits == 4
    assert log_probabilities(tmp_path / "wide").isfinite().all()


def test_a_checkpoint_without_a_shared_transform_or_an_expert_is_refused(made, tmp_path):
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save

    root, _ = made
    for part, message in (("gate_up_weight_theta", "theta is missing"), ("experts.1.", "lack|experts of")):
        shutil.copytree(root / "packed", tmp_path / part)
        tensors = load_file(tmp_path / part / "model.safetensors")
        save(
            {n: t for n, t in tensors.items() if part not in n}, tmp_path / part / "model.safetensors", {"format": "pt"}
        )
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path / part)
        with pytest.raises(CheckpointError):
            pairquant.inspect(tmp_path / part)


def test_the_originals_layout_of_experts_gives_the_right_logits(tmp_path):
    """Written from the format's description by NumPy alone: per-expert codes, one transform for all experts' inputs."""
    sizes = DENSE | {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 32}
    config = Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2)
    model = write_original(tmp_path / "original", config, byte_tokenizer().save_pretrained)
    tokens = torch.arange(3, 67)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert len(pairquant.inspect(tmp_path / "original").linears) == 2 * (4 + 4 * 3)


def test_every_family_with_experts_is_in_the_matrix():
    assert sum("experts" in family.kind for family in FAMILIES.values()) >= 20


class TestTransformPerExpert:
    """Two transforms for each expert, under names of their own, everywhere that experts go."""

    @pytest.fixture(scope="class", params=["Mixtral", "gpt-oss", "Nemotron-H"])
    def own(self, request, tmp_path_factory):
        root = tmp_path_factory.mktemp("own")
        heard = Heard()
        source = make_source(request.param, root / "source")
        quantize(source, root / "packed", heard, bits=8, transform_per_expert=True)
        return root, heard.notices

    def test_each_expert_stores_two(self, own):
        root, notices = own
        stored = StoredTensors.of_directory(root / "packed")
        homes = {path.rpartition(".")[0] for path in stored.pools()}
        thetas = {name for name in stored.fields if name.endswith("_weight_theta")}
        assert thetas == {f"{home}.{kind}_weight_theta" for home in homes for kind in ("gate_up", "down")}
        assert stored.has_own_transforms
        values = {tuple(stored.load(name).flatten().tolist()) for name in thetas}
        assert len(values) == len(thetas), "fitted apart"
        assert (
            json.loads((root / "packed" / "config.json").read_text())["quantization_config"]["transform_per_expert"]
            is True
        )
        assert sum("no kernel for GPUs runs these" in text for text in notices) == 1

    def test_it_loads_is_saved_again_and_exported(self, own, tmp_path):
        root, _ = own
        expected, found = log_probabilities(root / "source"), log_probabilities(root / "packed")
        assert (expected.exp() * (expected - found)).sum(-1).mean() < 1e-3
        AutoModelForCausalLM.from_pretrained(root / "packed", dtype=torch.float32).save_pretrained(tmp_path / "again")
        assert torch.equal(log_probabilities(tmp_path / "again"), found)
        pairquant.export(root / "packed", tmp_path / "plain", "fp32")
        torch.testing.assert_close(log_probabilities(tmp_path / "plain"), found, rtol=1e-3, atol=2e-3)

    def test_inspection_counts_each_transform_once_an_expert(self, own):
        root, _ = own
        checkpoint = pairquant.inspect(root / "packed").checkpoint
        layouts = {path: checkpoint.layout(path) for path in checkpoint.stored.pools()}
        weights = sum(layout.in_features * layout.out_features for layout in layouts.values())
        transforms = {checkpoint.stored.pools()[path]: layout.transform_bits() for path, layout in layouts.items()}
        codes = sum(layout.stored_bits() - layout.transform_bits() for layout in layouts.values())
        found = bits_per_weight(layouts, checkpoint.stored.pools())
        assert found == pytest.approx((codes + sum(transforms.values())) / weights)

    def test_a_missing_transform_is_named(self, own, tmp_path):
        root, _ = own
        damaged = shutil.copytree(root / "packed", tmp_path / "damaged")
        file = damaged / "model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("1.down_weight_theta"))
        save_file({key: value for key, value in tensors.items() if key != name}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"1\.(down_proj|w2)\.theta.*is missing"):
            AutoModelForCausalLM.from_pretrained(damaged)


def test_a_transform_per_expert_is_refused_without_experts(tmp_path):
    source = make_source("Qwen3", tmp_path / "source")
    with pytest.raises(ConfigError, match="transform_per_expert is True.*no experts.*--transform-per-expert out"):
        quantize(source, tmp_path / "packed", transform_per_expert=True)


@pytest.mark.parametrize("preset", ["best", "paper"])
def test_a_transform_per_expert_is_trained(preset, tmp_path):
    source = make_source("Qwen3-MoE", tmp_path / "source")
    recipe = recipe_with(
        preset, ["training.epochs=1", "training.weight_epochs=1"] if preset == "paper" else ["refit.epochs=1"]
    )
    quantize(source, tmp_path / "packed", bits=8, transform_per_expert=True, recipe=recipe)
    expected, found = log_probabilities(source), log_probabilities(tmp_path / "packed")
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 1e-3
    assert StoredTensors.of_directory(tmp_path / "packed").has_own_transforms
