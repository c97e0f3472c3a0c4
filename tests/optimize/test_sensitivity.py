"""Sensitivities predict what single weights really change, in every family, and leave the model as it was."""

import pytest
import torch
from families import FAMILIES as ALL
from scipy.stats import spearmanr
from test_families import make_source
from tiny_models import TEXT, byte_tokenizer, save_trained, tiny_model
from transformers import AutoModelForCausalLM

from pairquant.evaluation.quality import measure
from pairquant.models.planning import plan_model
from pairquant.optimize import sensitivity
from pairquant.optimize.allocation import forms_of, units_of
from pairquant.optimize.homes import InPlace
from pairquant.optimize.sensitivity import Measurement, Sensitivity, completed, cut, to_measure
from pairquant.spec.linear import Spec
from pairquant.spec.mixed import Candidates
from pairquant.spec.options import QuantConfig

CPU = torch.device("cpu")


class Recording(Measurement):
    """Keeps every error."""

    def _errors(self, block, moments):
        found = super()._errors(block, moments)
        self.kept.update(found)
        return found


def measured(model, tokens, candidates="bits:2|3", kind=Measurement, **options):
    config = QuantConfig(**{"group_size": 32, "rotations": 2, "candidates": candidates, **options})
    plan, blocks = plan_model(model, config)
    forms = forms_of(plan, config)
    measurement = kind(model, blocks, forms, config, CPU, InPlace())
    measurement.kept = {}
    return plan, blocks, measurement, measurement.run(tokens)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return save_trained(tmp_path_factory.mktemp("sensitivity") / "source", steps=150)


def test_estimates_rank_weights_as_their_true_divergences_do(trained):
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    tokens = torch.tensor(byte_tokenizer()(TEXT.read_text())["input_ids"])[: 16 * 64].view(16, 64)
    _, blocks, measurement, found = measured(model, tokens, kind=Recording)
    sites = {path: site for block in blocks for path, site in block.sites.items()}
    true, estimates = [], []
    for path, of in measurement.kept.items():
        for spec, error in of.items():
            weight = sites[path].weight.clone()
            sites[path].put(weight - error)
            true.append(measure(model, tokens, original).kl)
            estimates.append(found.divergences[path][spec])
            sites[path].put(weight)
    assert len(true) == 28
    assert spearmanr(true, estimates)[0] > 0.9
    assert 0.2 < sum(estimates) / sum(true) < 5, "of the right size too"


def test_the_model_is_left_as_it_was_and_the_same_comes_out_twice():
    model = tiny_model()
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    tokens = torch.randint(3, 259, (4, 48), generator=torch.Generator().manual_seed(0))
    first, second = (measured(model, tokens)[-1] for _ in range(2))
    assert first == second
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert Sensitivity.from_dict(first.to_dict(), "").readers == first.readers


@pytest.mark.parametrize("family", ["Qwen3-MoE", "Qwen3-Next", "gpt-oss", "Falcon-H1"])
def test_other_families_are_measured_too(family, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_source(family, tmp_path / "source"), dtype=torch.float32)
    tokens = torch.randint(3, 100, (4, 32), generator=torch.Generator().manual_seed(0))
    plan, blocks, _, found = measured(model, tokens, ignore=("lm_head",))
    assert all(value >= 0 for of in found.divergences.values() for value in of.values())
    assert sum(of[min(of, key=lambda s: s.bits)] > 0 for of in found.divergences.values()) > len(found.divergences) / 2
    sites = {path: site for block in blocks for path, site in block.sites.items()}
    units = units_of(forms_of(plan, QuantConfig()), plan.layouts, sites, found.readers, found.divergences)
    assert {path for unit in units for path in unit.paths} == set(plan.layouts)
    assert family in ALL


def test_some_experts_stand_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "SAMPLED_EXPERTS", 2)
    model = AutoModelForCausalLM.from_pretrained(make_source("Qwen3-MoE", tmp_path / "source"), dtype=torch.float32)
    tokens = torch.randint(3, 100, (4, 32), generator=torch.Generator().manual_seed(0))
    plan, blocks, _, found = measured(model, tokens)
    experts = [path for path in plan.layouts if ".experts." in path]
    assert len([path for path in found.divergences if ".experts." in path]) == len(experts) / 2
    sites = {path: site for block in blocks for path, site in block.sites.items()}
    units = units_of(
        forms_of(plan, QuantConfig(candidates="bits:2|3")), plan.layouts, sites, found.readers, found.divergences
    )
    pools = [unit for unit in units if unit.pool]
    assert len(pools) == 2 * len(blocks)
    for unit in pools:
        mine = [found.divergences[path] for path in unit.paths if path in found.divergences]
        assert unit.forms[0].divergence == pytest.approx(2 * sum(of[unit.forms[0].spec] for of in mine))


def test_forms_that_are_not_measured_follow_from_those_that_are():
    forms = Candidates.parse("bits:2|3|4|8,group_size:32|64,rotations:0|4").specs(Spec())
    law = {spec: 4.0**-spec.bits * (1 + spec.group_size) / (1 + spec.rotations) for spec in forms}
    chosen = to_measure(forms)
    assert len(chosen) == 4 + 4 - 1
    found = completed({spec: law[spec] for spec in chosen}, forms)
    assert found == pytest.approx(law)
    without = [spec for spec in forms if spec != Spec(3, 32, 0)]  # nothing to follow from at this kind
    assert {spec for spec in without if (spec.group_size, spec.rotations) == (32, 0)} <= set(to_measure(without))


def test_the_text_is_cut_evenly_from_the_windows(monkeypatch):
    monkeypatch.setattr(sensitivity, "WINDOWS", 3)
    monkeypatch.setattr(sensitivity, "WINDOW_TOKENS", 4)
    tokens = torch.arange(20).view(2, 10)
    assert cut(tokens).tolist() == [[0, 1, 2, 3], [10, 11, 12, 13], [4, 5, 6, 7]]
    assert cut(tokens[:, :3]).tolist() == [[0, 1, 2], [10, 11, 12]]
