"""Names of the source: found for single experts, renamed modules and tensors that the class does not know."""

import pytest
from families import FAMILIES
from transformers import AutoModelForCausalLM

from pairquant.checkpoint.headers import StoredTensors
from pairquant.models.names import OWN, Names
from pairquant.models.sites import ExpertSite, sites_in


def named(family, directory, *more):
    model = AutoModelForCausalLM.from_config(FAMILIES[family].build())
    model.save_pretrained(directory)
    stored = [*StoredTensors.of_directory(directory).fields, *more]
    return model, Names.of(model, stored), stored


@pytest.mark.parametrize(
    "family", ["LLaMA 2, 3", "Mixtral", "Qwen3-MoE", "gpt-oss", "Granite MoE", "Nemotron-H", "Jamba"]
)
def test_every_parameter_is_found_and_every_tensor_used(family, tmp_path):
    model, names, stored = named(family, tmp_path)
    assert set(model.state_dict()) == set(names.sources)
    assert sorted(name for own in names.sources.values() for name in own) == sorted(stored)
    assert not names.unknown


def test_single_experts_have_the_sources_names_in_the_order_in_which_they_are_joined(tmp_path):
    model, names, _ = named("Mixtral", tmp_path)
    paths = [site.path for site in sites_in(model, names=names) if isinstance(site, ExpertSite)]
    assert paths[:3] == [f"model.layers.0.block_sparse_moe.experts.0.{part}" for part in ("w1", "w3", "w2")]
    assert names.joins(f"{paths[0]}.weight")
    assert names.module("model.layers.0.mlp.gate") == "model.layers.0.block_sparse_moe.gate"


def test_experts_of_one_tensor_are_named_by_number_and_part(tmp_path):
    model, names, _ = named("gpt-oss", tmp_path)
    paths = [site.path for site in sites_in(model, names=names) if isinstance(site, ExpertSite)]
    assert paths[:3] == [f"model.layers.0.mlp.experts.0.{part}_proj" for part in ("gate", "up", "down")]
    assert not names.joins(f"{paths[0]}.weight")


def test_what_the_class_does_not_use_is_told_of(tmp_path):
    _, names, _ = named("Qwen3-MoE", tmp_path, "mtp.fc.weight")
    assert names.unknown == ("mtp.fc.weight",)


def test_a_parameter_is_called_what_the_source_would_call_it(tmp_path):
    _, names, _ = named("Granite MoE", tmp_path)
    assert names.renamed("model.layers.0.block_sparse_moe.router.weight").endswith("router.layer.weight")
    assert OWN.renamed("a.weight") == OWN.stored("a.weight") == "a.weight"
