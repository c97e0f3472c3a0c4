"""The walk: every family is fitted, better than by rounding, and the same way twice."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import FAMILIES, tiny_model

from pairquant.core.linear import decode
from pairquant.evaluation.quality import measure
from pairquant.models.planning import plan_model
from pairquant.optimize.walk import Walk, quantize_blocks
from pairquant.spec.options import QuantConfig
from pairquant.spec.recipe import PRESETS, Recipe, Refit, Training

CPU = torch.device("cpu")
SHORT = Recipe(steps=20)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 259, (8, 48), generator=torch.Generator().manual_seed(1))


def run(model, tokens, **options):
    config = QuantConfig(**{"group_size": 32, "bits": 3, "recipe": SHORT, **options})
    return list(quantize_blocks(model, tokens, config, CPU))


def walk(model, config, *tokens):
    plan, blocks = plan_model(model, config)
    return Walk(model, blocks, plan, config, CPU, *tokens).run()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_ends_nearer_to_the_original_than_round_to_nearest(family, tokens):
    original, fitted, nearest = (tiny_model(family) for _ in range(3))
    run(fitted, tokens)
    run(nearest, None, preset="rtn", recipe=PRESETS["rtn"])
    held_out = torch.randint(3, 259, (8, 48), generator=torch.Generator().manual_seed(2))
    assert measure(fitted, held_out, original).kl < 0.7 * measure(nearest, held_out, original).kl


def test_blocks_hold_the_decoded_weights_and_all_else_is_untouched(tokens):
    original = tiny_model("qwen2")
    model = copy.deepcopy(original)
    results = run(model, tokens, ignore=("lm_head", "o_proj"))
    quantized = {path: packed for result in results for path, packed in result.packed.items()}
    for name, parameter in model.named_parameters():
        path = name.removesuffix(".weight")
        expected = decode(quantized[path]) if path in quantized else original.get_parameter(name)
        torch.testing.assert_close(parameter.data, expected.data, rtol=0, atol=0)
    assert not any("o_proj" in path for path in quantized)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tokens):
    def words(seed):
        results = run(tiny_model(), tokens, seed=seed)
        return {(path, name): t for r in results for path, p in r.packed.items() for name, t in p.tensors.items()}

    first, again, other = words(0), words(0), words(1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first if key[1] == "pairs")


def test_shared_transforms_are_equal_and_listed(tokens):
    (result, _) = run(tiny_model(), tokens, share_rotations=True)
    names = [{path.rpartition(".")[2] for path in group} for group in result.shared]
    assert names == [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}]
    for group in result.shared:
        for name in ("theta", "pairs", "channel_scales"):
            first, *others = (result.packed[path][name] for path in group)
            assert all(torch.equal(first, other) for other in others)


def test_low_precision_models_are_fitted_in_float32_and_keep_their_dtype(tokens):
    model = tiny_model(dtype=torch.bfloat16)
    results = run(model, tokens)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(0 < error < 0.5 for result in results for error in result.errors.values())


def test_drift_corrects_what_earlier_layers_lost(tokens):
    original = tiny_model(seed=3)
    losses = {}
    for drift in (0.0, 0.25):
        model = copy.deepcopy(original)
        run(model, tokens, recipe=replace(SHORT, drift=drift))
        losses[drift] = measure(model, tokens, original).kl
    assert losses[0.25] < losses[0.0]


BLOCKWISE = {
    "refit": replace(SHORT, refit=Refit(epochs=1, batch=4)),
    "training": Recipe(training=Training(epochs=1, weight_epochs=1, batch=4)),
}


@pytest.mark.parametrize("recipe", BLOCKWISE)
def test_a_block_that_is_left_as_it_is_only_carries_the_text_on(recipe, tokens):
    model = tiny_model()
    before = copy.deepcopy(model.model.layers[0].state_dict())
    config = QuantConfig(group_size=32, ignore=("lm_head", r"re:.*layers\.0\..*"), recipe=BLOCKWISE[recipe])
    first, second = walk(model, config, tokens, tokens[:4])
    assert not first.packed
    assert not first.parameters
    assert len(second.packed) == 7
    assert all(torch.equal(value, before[name]) for name, value in model.model.layers[0].state_dict().items())


@pytest.mark.parametrize("recipe", BLOCKWISE)
def test_more_windows_to_validate_than_to_train_on(recipe, tokens):
    config = QuantConfig(group_size=32, recipe=BLOCKWISE[recipe])
    results = list(walk(tiny_model(), config, tokens[:2], tokens[2:]))
    assert all(result.history for result in results)


@pytest.mark.parametrize("recipe", BLOCKWISE)
def test_block_wise_training_in_bfloat16(recipe, tokens):
    config = QuantConfig(group_size=32, compute="bfloat16", recipe=BLOCKWISE[recipe])
    results = list(walk(tiny_model(dtype=torch.bfloat16), config, tokens))
    assert all(0 < error < 0.5 for result in results for error in result.errors.values())
