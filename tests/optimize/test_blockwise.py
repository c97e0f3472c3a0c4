"""Block-wise training and the refit: each lowers the block's error, keeps its best epoch, and leaves nothing behind."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from pairquant.core.grid import fake_quantize
from pairquant.core.linear import Transform, decode, encode
from pairquant.core.packing import unpack
from pairquant.models.blocks import enter, find_blocks
from pairquant.optimize.blockwise import BlockData, BlockTask, _Objective, refit_block, train_block
from pairquant.optimize.stages import BlockTransforms
from pairquant.spec.options import QuantConfig
from pairquant.spec.recipe import Recipe, Refit, Training
from pairquant.support.errors import ConfigError

TRAINING = Training(epochs=4, weight_epochs=3, weight_rate=1e-3, quantizer_rate=1e-4, batch=4)
ONLY_TRANSFORM = replace(TRAINING, weight_epochs=0)
NONE = replace(TRAINING, epochs=0, weight_epochs=0)
REFIT = Refit(epochs=6, batch=4, scale_rate=2e-3, transform_rate=2e-3, norm_rate=2e-3)
SHARED = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)
MICRO_BATCH = 2


def options(training=TRAINING, refit=REFIT, transform=True, channel_scales=True, **others):
    recipe = Recipe(
        fits_transform=transform, channel_scales=channel_scales, training=training, refit=refit, rounding="nearest"
    )
    return QuantConfig(**{"group_size": 32, "bits": 3, "rotations": 4, "recipe": recipe, **others})


class Scene:
    """The first block of a small model, what it is called with, and what it is trained on."""

    def __init__(self, family="llama", validation=True, noise=0.02):
        model = tiny_model(family)
        blocks = find_blocks(model, ("lm_head",))
        tokens = torch.randint(3, 259, (14, 24), generator=torch.Generator().manual_seed(1))
        entry = enter(model, blocks, tokens, MICRO_BATCH)
        states, self.call, self.block = entry.hidden, entry.calls[0], blocks[0]
        with torch.no_grad():
            targets = [self.call.run(self.block.module, hidden) for hidden in states]
        generator = torch.Generator().manual_seed(2)
        inputs = [h + noise * h.std() * torch.randn(h.shape, generator=generator) for h in states]  # of earlier blocks
        held_out = (inputs[5:], targets[5:]) if validation else ([], [])
        self.data = BlockData(inputs[:5], targets[:5], *held_out)
        self.epochs = []

    def groups(self, shared=False):
        if not shared:
            return [(path,) for path in self.block.sites]
        return [tuple(path for name in names for path in self.block.sites if path.endswith(name)) for names in SHARED]

    def task(self, config, shared=False):
        groups = self.groups(shared)
        layouts = {
            path: config.spec.layout(site.size.in_features, site.size.out_features, site.size.bias)
            for path, site in self.block.sites.items()
        }
        seeds = {group[0]: number for number, group in enumerate(groups)}
        return BlockTask(self.block, self.call, self.data, layouts, groups, seeds, config, self.epochs.append)

    def train(self, config, shared=False):
        """Train, and give the block the decoded weights."""
        task = self.task(config, shared)
        return self.settled(train_block(task, [1.0] * len(task.groups)))

    def refit(self, packed, config, shared=False, **others):
        return self.settled(refit_block(self.task(config, shared), packed, **others))

    def settled(self, packed):
        for path, linear in packed.items():
            self.block.sites[path].put(decode(linear))
        return packed

    @torch.no_grad()
    def loss(self, kind=F.smooth_l1_loss):
        """What chooses the epoch, by the block as it stands."""
        pairs = zip(*self.data.held_out, strict=True)
        return torch.stack([kind(self.call.run(self.block.module, x), y) for x, y in pairs]).mean().item()

    def chosen(self, stage):
        return min(epoch["validation"] for epoch in self.epochs if epoch["stage"] == stage)


def rounded(**others):
    """A scene whose block was rounded to nearest without a transform, and its packed linears."""
    scene = Scene(**others)
    return scene, scene.train(options(NONE, transform=False))


def words(packed):
    return {(path, name): t for path, p in packed.items() for name, t in p.tensors.items()}


def same(first, second):
    return all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_each_stage_lowers_the_loss():
    losses = {}
    for training in (NONE, ONLY_TRANSFORM, TRAINING):
        scene = Scene()
        scene.train(options(training))
        losses[training] = scene.loss()
    assert losses[ONLY_TRANSFORM] < 0.8 * losses[NONE]
    assert losses[TRAINING] < 0.95 * losses[ONLY_TRANSFORM]


@pytest.mark.parametrize("loss", ["smooth_l1", "mse"])
def test_the_block_answers_as_it_did_in_training(loss):
    scene = Scene()
    scene.train(options(replace(TRAINING, loss=loss)))
    measured = scene.loss(F.mse_loss if loss == "mse" else F.smooth_l1_loss)
    assert measured == pytest.approx(scene.chosen(stage=2), rel=1e-4)


def test_stage_two_starts_where_stage_one_ended():
    scene = Scene()
    scene.train(options())
    start = next(e for e in scene.epochs if e["stage"] == 2)
    assert start["epoch"] == 0
    assert start["loss"] is None
    assert start["validation"] == pytest.approx(scene.chosen(stage=1), rel=0.02)
    assert [(e["stage"], e["epoch"]) for e in scene.epochs] == [(1, i) for i in range(5)] + [(2, i) for i in range(4)]


@pytest.mark.parametrize("validation", [True, False])
def test_the_best_epoch_is_kept_when_training_only_does_harm(validation):
    absurd = replace(TRAINING, transform_rate=500.0, weight_rate=500.0, quantizer_rate=500.0)
    scene, untrained = Scene(validation=validation), Scene(validation=validation)
    packed, expected = scene.train(options(absurd)), untrained.train(options(NONE))
    assert same(words(packed), words(expected))
    assert len(scene.epochs) == 9


def test_without_training_it_is_round_to_nearest():
    scene = Scene()
    weights = {path: linear.weight.clone() for path, linear in scene.block.sites.items()}
    config = options(NONE, transform=False)
    packed = scene.train(config)
    assert scene.epochs == []
    for path, weight in weights.items():
        recipe = replace(config.recipe, shrinks=(1.0,), sweeps=0)
        identity = Transform.identity(weight.shape[1], 32)
        expected = encode(weight, identity, None, config.spec.layout(weight.shape[1], weight.shape[0]), recipe)
        assert same(packed[path].tensors, expected.tensors)


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"rotations": 0}, {1, 2}),
        ({"channel_scales": False}, {1, 2}),
        ({"rotations": 0, "channel_scales": False}, {2}),
        ({"transform": False}, {2}),
        ({"training": ONLY_TRANSFORM}, {1}),
        ({"training": replace(TRAINING, epochs=0)}, {2}),
        ({"symmetric": True, "bits": 4}, {1, 2}),
        ({"pair_selection": "magnitude"}, {1, 2}),
        ({"training": replace(TRAINING, batch=3)}, {1, 2}),  # 2 micro-batches a step, the fifth alone
    ],
    ids=str,
)
def test_variants_end_no_worse_than_they_start(changes, stages):
    scene, untrained = Scene(), Scene()
    config = options(**changes)
    packed = scene.train(config)
    untrained.train(options(**{**changes, "training": NONE}))
    assert {e["stage"] for e in scene.epochs} == stages
    assert scene.loss() <= untrained.loss() * 1.0001
    for path, p in packed.items():
        assert p["theta"].shape[0] == config.rotations
        assert config.recipe.channel_scales or (p["channel_scales"] == 1).all()
        assert not config.symmetric or (unpack(p["qzeros"], 4) == 8).all()
        p.check_values(path)


def test_angles_of_pairs_that_only_fill_up_stay_at_zero():
    scene, config = Scene(), options(ONLY_TRANSFORM, rotations=16)
    task = scene.task(config)
    seeds, starts = task.seeds, [1.0] * len(task.groups)
    untrained = BlockTransforms.untrained(scene.block, task.groups, task.layouts, seeds, starts, "random")
    ((_, transforms),) = untrained.sets
    free = transforms.free
    packed = scene.refit(scene.train(config), config)
    theta = torch.cat([packed[path]["theta"] for path in seeds], dim=1)
    assert 0 < (~free).sum() < 0.2 * free.numel()
    assert torch.equal(theta != 0, free)


@pytest.mark.parametrize("stage", ["train", "refit"])
def test_shared_transforms_are_equal(stage):
    scene = Scene()
    packed = scene.train(options(ONLY_TRANSFORM), shared=True)
    if stage == "refit":
        before, packed = packed, scene.refit(packed, options(), shared=True)
        assert not same(words(before), words(packed))
    for group in scene.groups(shared=True):
        for name in ("theta", "pairs", "channel_scales"):
            first, *others = (packed[path][name] for path in group)
            assert all(torch.equal(first, other) for other in others)
    thetas = [packed[group[0]]["theta"] for group in scene.groups(shared=True)]
    assert not any(torch.equal(thetas[0], theta) for theta in thetas[1:])


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    first, again, other = (words(Scene().train(options(seed=seed))) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "phi3"])
def test_nothing_is_left_behind_but_decoded_weights(family):
    scene = Scene(family)
    module, before = scene.block.module, copy.deepcopy(scene.block.module.state_dict())
    modules, attributes = list(module.modules()), [set(vars(m)) for m in module.modules()]
    packed = scene.train(options(replace(TRAINING, epochs=1, weight_epochs=1)))
    assert all(a is b for a, b in zip(modules, module.modules(), strict=True))
    assert attributes == [set(vars(m)) for m in module.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks or m.training for m in module.modules())
    assert not any(p.requires_grad or p.grad is not None or not p.is_leaf for p in module.parameters())
    for name, tensor in module.state_dict().items():
        path = f"{scene.block.path}.{name.removesuffix('.weight')}"
        expected = decode(packed[path]) if name.endswith(".weight") and path in packed else before[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


def test_a_batch_below_the_micro_batch_is_refused():
    with pytest.raises(ConfigError, match="batch is 1, but micro-batches hold 2"):
        Scene().train(options(replace(TRAINING, batch=1)))


@pytest.mark.parametrize("validation", [True, False])
def test_refit_lowers_the_loss_and_keeps_the_codes(validation):
    scene, packed = rounded(validation=validation)
    before = scene.loss()
    refitted = scene.refit(packed, options(transform=False))
    assert scene.loss() < 0.95 * before
    assert scene.loss() == pytest.approx(scene.chosen(stage=3), rel=1e-4)
    for path, old in packed.items():
        new = refitted[path]
        assert all(torch.equal(old[name], new[name]) for name in ("qweight", "qzeros", "pairs"))
        assert not torch.equal(old["scales"], new["scales"])
        torch.testing.assert_close(scene.block.sites[path].weight, decode(new), rtol=0, atol=0)


def test_refit_trains_everything_that_is_continuous():
    scene = Scene()
    packed = scene.train(options(ONLY_TRANSFORM))
    norm = scene.block.module.input_layernorm.weight
    before, start = norm.clone(), scene.loss()
    refitted = scene.refit(packed, options(), kept_as=torch.bfloat16)
    assert scene.loss() < start
    for name in ("scales", "theta", "channel_scales"):
        assert not any(torch.equal(packed[path][name], refitted[path][name]) for path in packed)
    assert not torch.equal(norm, before)
    assert torch.equal(norm, norm.bfloat16().float())


def test_refit_that_only_does_harm_changes_nothing():
    scene = Scene()
    packed = scene.train(options(ONLY_TRANSFORM))
    state = copy.deepcopy(scene.block.module.state_dict())
    refitted = scene.refit(packed, options(refit=Refit(3, 4, scale_rate=50.0, transform_rate=50.0, norm_rate=50.0)))
    assert same(words(packed), words(refitted))
    assert same(state, scene.block.module.state_dict())
    assert not any(p.requires_grad for p in scene.block.module.parameters())


def test_stage_one_measures_what_the_plain_quantizer_gives():
    """At epoch 0, all angles zero and scales one, the block computes with W rounded to nearest."""
    scene, plain = Scene(), Scene()
    scene.train(options(replace(TRAINING, epochs=1)))
    for linear in plain.block.sites.values():
        linear.put(fake_quantize(linear.weight, 3, 32))
    assert scene.epochs[0]["validation"] == pytest.approx(plain.loss(), rel=1e-4)


def test_experts_compute_in_bfloat16_where_the_other_linears_do():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES["Qwen3-MoE"].build()).eval()
    block = find_blocks(model)[0]
    module, seen = block.module.mlp.experts, []
    module.act_fn.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    call = enter(model, [block], torch.randint(3, 259, (2, 16)), 2).calls[0]
    weights = {"model.layers.0.mlp.experts.gate_up_proj": module.gate_up_proj.detach().clone().requires_grad_()}
    x = torch.randn(2, 16, 64)
    for dtype in (torch.float32, torch.bfloat16):
        block.module.to(dtype)
        task = BlockTask(block, call, BlockData([x], [x], [], []), {}, [], {}, QuantConfig())
        _Objective(task, call, "mse").of(weights, x, x, torch.arange(2)).backward()
        assert seen[-1] == dtype
        (leaf,) = weights.values()
        assert leaf.grad.dtype == torch.float32
        assert leaf.grad.abs().sum() > 0
