"""Training the whole quantized model: its gradients are those of the whole, it lowers the divergence, and keeps the codes."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from tiny_models import tiny_model
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from pairquant.core.linear import decode
from pairquant.models.planning import plan_model
from pairquant.models.rounded_inputs import round_inputs, roundings_of
from pairquant.optimize.end_to_end import EndToEndTraining, _Whole, groups_of
from pairquant.optimize.homes import InPlace
from pairquant.optimize.streams import Places, Streams
from pairquant.optimize.walk import Walk
from pairquant.spec.options import QuantConfig
from pairquant.spec.recipe import PRESETS, EndToEnd
from pairquant.support.errors import CalibrationError, ConfigError

CPU = torch.device("cpu")
TOKENS = torch.randint(3, 259, (6, 32), generator=torch.Generator().manual_seed(7))
RATES = {"scale_rate": 2e-3, "transform_rate": 2e-3, "norm_rate": 2e-3}
USUAL = EndToEnd(epochs=4, batch=2, **RATES)


class Scene:
    """A small model, what quantizing made of it, and the training of the whole."""

    def __init__(self, model, preset="quick", how=USUAL, **options):
        recipe = replace(PRESETS[preset], end_to_end=how, steps=5)
        self.config = QuantConfig(
            preset=preset, recipe=recipe, **{"group_size": 32, "bits": 3, "rotations": 2, **options}
        )
        self.original, quantized = model, copy.deepcopy(model)
        plan, blocks = plan_model(quantized, self.config)
        self.results = list(Walk(quantized, blocks, plan, self.config, CPU, TOKENS).run())
        _, self.blocks = plan_model(self.original, self.config)
        self.heard = []
        self.training = EndToEndTraining(
            self.original, self.blocks, self.results, self.config, CPU, InPlace(),
            report=lambda epoch, divergence: self.heard.append(divergence),
        )  # fmt: skip

    def model(self, blocks):
        """The model with what a list of blocks, quantized or trained, holds."""
        model = copy.deepcopy(self.original)
        _, places = plan_model(model, self.config)
        for place, block in zip(places, blocks, strict=True):
            for path, packed in block.packed.items():
                place.sites[path].put(decode(packed))
            round_inputs(place.sites, roundings_of(place.sites, block.packed, CPU))
            for path, value in block.parameters.items():
                model.get_parameter(path).data = value
        return model

    @torch.no_grad()
    def divergence(self, model):
        logits = [m(input_ids=TOKENS, use_cache=False).logits.log_softmax(-1) for m in (self.original, model)]
        return (F.kl_div(logits[1], logits[0], reduction="sum", log_target=True) / TOKENS.numel()).item()

    def whole(self):
        """The model as a step of the training sees it."""
        streams = Streams.start(
            self.original, self.training.decoders, TOKENS, True, Places(CPU, CPU, torch.float32), print
        )
        entering = torch.cat(streams.quantized)
        students = self.training._students(streams)
        with self.training._end(TOKENS, torch.cat(streams.original)) as end:
            return _Whole(students, end, entering, 2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_gradients_are_those_of_the_whole_model(family):
    scene = Scene(tiny_model(family))
    whole, chosen = scene.whole(), torch.tensor([4, 1, 3])
    trained = [tensor.requires_grad_() for tensor, _ in whole.trained]
    with torch.no_grad():
        whole.gather(chosen)
    found = [tensor.grad for tensor in trained]
    weights = {name: w for student in whole.students for name, w in student.stage.weights().items()}
    model, tokens = scene.original, TOKENS[chosen]
    with torch.no_grad():
        original = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    arguments = {"input_ids": tokens, "use_cache": False}
    quantized = functional_call(model, weights, (), arguments).logits.log_softmax(-1)
    loss = F.kl_div(quantized, original, reduction="sum", log_target=True) / tokens.numel()
    expected = torch.autograd.grad(loss, trained)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("preset", ["quick", "best", "rtn"])
def test_it_lowers_the_divergence_it_reports_and_keeps_the_codes(preset):
    scene = Scene(tiny_model(), preset)
    before = scene.divergence(scene.model(scene.results))
    original = copy.deepcopy(scene.original.state_dict())
    trained = scene.training.run(TOKENS)
    assert all(torch.equal(t, original[name]) for name, t in scene.original.state_dict().items())
    after = scene.divergence(scene.model(trained))
    assert scene.heard[0] == pytest.approx(before, rel=1e-3)
    assert min(scene.heard) == pytest.approx(after, rel=1e-3)
    assert after < 0.95 * before
    for result, block in zip(scene.results, trained, strict=True):
        for path, packed in result.packed.items():
            for name in ("qweight", "qzeros", "pairs"):
                assert torch.equal(packed[name], block.packed[path][name])


@pytest.mark.parametrize("family", ["llama", "Mixtral"])
def test_it_trains_a_model_that_rounds_its_activations(family):
    torch.manual_seed(0)
    model = (
        AutoModelForCausalLM.from_config(FAMILIES[family].build()).eval().float()
        if family in FAMILIES
        else tiny_model()
    )
    scene = Scene(model, activations="int4", bits=4)
    before = scene.divergence(scene.model(scene.results))
    trained = scene.training.run(TOKENS)
    after = scene.divergence(scene.model(trained))
    assert scene.heard[0] == pytest.approx(before, rel=2e-2)
    assert min(scene.heard) == pytest.approx(after, rel=2e-2)
    assert after < 0.95 * before


def test_windows_that_are_held_out_choose_the_epoch_and_are_not_trained_on():
    scene = Scene(tiny_model(), how=EndToEnd(epochs=2, batch=2, **RATES))
    scene.training.run(TOKENS[:4], TOKENS[4:])
    apart = scene.heard[:]
    scene.heard.clear()
    scene.training.run(TOKENS[:4], TOKENS[:4])
    assert apart[0] != scene.heard[0]
    assert apart[-1] > scene.heard[-1], "what is trained on falls further"
    whole = scene.whole()
    assert whole.divergence(torch.arange(4, 6)) == pytest.approx(apart[0], rel=1e-4)


def test_windows_are_measured_in_parts_alike(monkeypatch):
    whole = Scene(tiny_model()).whole()
    together = whole.divergence(torch.arange(6))
    monkeypatch.setattr("pairquant.optimize.end_to_end.MEASURED_TOGETHER", 4)
    assert whole.divergence(torch.arange(6)) == pytest.approx(together, rel=1e-6)


def test_linears_that_share_a_transform_still_do():
    scene = Scene(tiny_model(), share_rotations=True)
    for result, block in zip(scene.results, scene.training.run(TOKENS), strict=True):
        assert result.shared
        for group in result.shared:
            for name in ("theta", "channel_scales"):
                first = block.packed[group[0]]
                assert all(torch.equal(first[name], block.packed[path][name]) for path in group)
                assert not torch.equal(first[name], result.packed[group[0]][name])


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_output_embedding_is_trained_too(tied):
    model = tiny_model("qwen3" if tied else "llama")
    scene = Scene(model, head_bits=3)
    before = scene.divergence(scene.model(scene.results))
    trained = scene.training.run(TOKENS)
    assert scene.divergence(scene.model(trained)) < 0.95 * before
    assert scene.heard[0] == pytest.approx(before, rel=1e-3)
    ((path, head),) = trained[-1].packed.items()
    assert not torch.equal(head["scales"], scene.results[-1].packed[path]["scales"])


@pytest.mark.parametrize("family", ["Falcon", "Mixtral", "gpt-oss", "Jamba", "Qwen3-Next", "DeepSeek V3, Kimi K2"])
def test_other_families_are_trained(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family].build()).eval().float()
    scene = Scene(model, how=EndToEnd(epochs=2, batch=2, **RATES), bits=4)
    before = scene.divergence(scene.model(scene.results))
    trained = scene.training.run(TOKENS)
    assert scene.heard[0] == pytest.approx(before, rel=1e-2)
    assert scene.divergence(scene.model(trained)) < before


def test_the_start_is_kept_where_nothing_is_better():
    scene = Scene(tiny_model(), how=EndToEnd(epochs=1, batch=6, scale_rate=5.0, transform_rate=5.0, norm_rate=5.0))
    for result, block in zip(scene.results, scene.training.run(TOKENS), strict=True):
        for path, packed in result.packed.items():
            assert all(torch.equal(t, block.packed[path].tensors[name]) for name, t in packed.tensors.items())
    assert scene.heard[1] > scene.heard[0]


def test_every_linear_is_in_one_group():
    scene = Scene(AutoModelForCausalLM.from_config(FAMILIES["Mixtral"].build()).eval().float())
    for block, result in zip(scene.blocks, scene.results, strict=True):
        groups = groups_of(block, result)
        assert sorted(path for group in groups for path in group) == sorted(result.packed)
        assert any(len(group) > 1 for group in groups)


def test_a_divergence_that_is_not_finite_is_refused():
    scene = Scene(tiny_model())
    scene.original.model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(CalibrationError, match="not finite"):
        scene.training.run(TOKENS)


@pytest.mark.parametrize(("values", "message"), [({"epochs": -1}, "epochs"), ({"scale_rate": -0.1}, "scale_rate")])
def test_settings_are_checked(values, message):
    with pytest.raises(ConfigError, match=message):
        EndToEnd(**values)
