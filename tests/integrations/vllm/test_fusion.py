"""Which layers of vLLM compute what comes before them, and how they are changed."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from pairquant.spec.linear import Spec
from pairquant.support.errors import ConfigError

pytest.importorskip("vllm", reason="needs vLLM")

from pairquant.integrations.packed_layers import Pending
from pairquant.integrations.vllm import compat, fusion
from pairquant.integrations.vllm.linear import PairQuantLinearMethod


@pytest.fixture
def faster(monkeypatch):
    """Every backend is faster with what comes before a layer."""
    monkeypatch.setattr(fusion, "choose", lambda *_: SimpleNamespace(most=3, fuses=lambda *_: True))


def linear(sizes=(32, 32), **changes):
    """What `fusion` sees of a linear of vLLM that is about to be loaded."""
    method = PairQuantLinearMethod(Spec(4, 32, 2), "a.qkv_proj")
    pending = Pending("a.qkv_proj", [Spec(4, 32, 2).layout(64, size) for size in sizes], torch.bfloat16, 64)
    made = SimpleNamespace(
        quant_method=method, pairquant=pending, skip_bias_add=False, qweight=torch.empty(0), bias=None
    )
    made.__dict__.update(changes)
    return made


@pytest.mark.parametrize("listed", sorted(fusion.LAYERS | fusion.ATTENTION | fusion.MLPS))
def test_the_classes_that_are_listed_exist_and_are_known_by_their_names(listed):
    file, name = listed.split(".")
    cls = getattr(importlib.import_module(f"vllm.model_executor.models.{file}"), name)
    assert fusion._name(cls.__new__(cls)) == listed


def test_a_class_of_another_home_is_not_taken_for_vllms():
    assert fusion._name(type("LlamaMLP", (), {"__module__": "elsewhere.llama"})()) == ""
    assert fusion._name(torch.nn.Linear(1, 1)) == ""


def test_no_backend_of_cpus_asks_for_it():
    assert not fusion.fits("norm", linear())


@pytest.mark.parametrize(
    "changes",
    [
        {"skip_bias_add": True},
        {"gather_output": True},
        {"input_is_parallel": False},
        {"quant_method": None},
        {"pairquant": "ready"},
        {"sizes": (32, 32, 32, 32)},
    ],
    ids=str,
)
def test_linears_that_do_more_or_run_in_parts_stay_as_they_are(faster, changes):
    assert fusion.fits("norm", linear())
    assert not fusion.fits("norm", linear(**changes))


def test_norms_of_another_kind_stay_as_they_are():
    norm = compat.RMSNorm.__new__(compat.RMSNorm)
    norm.__dict__.update(has_weight=True, variance_size_override=None)
    assert fusion.is_plain(norm)
    norm.variance_size_override = 32
    assert not fusion.is_plain(norm)
    assert not fusion.is_plain(torch.nn.RMSNorm(64))


def test_a_norm_runs_its_linear_and_the_first_layer_normalizes_alone():
    calls = []
    given = linear(bias=torch.ones(1))
    given.pairquant = SimpleNamespace(
        run=lambda layer, index, x, bias: calls.append((index, x, bias)) or "product",
        run_after_norm=lambda layer, *rest: calls.append(rest) or ("product", "sum"),
    )
    norm = SimpleNamespace(_forward_method=lambda x: ("normed", x), weight="w", variance_epsilon=1e-6)
    fusion.run_linear_in(norm, given)
    assert norm._forward_method("x") == "product"
    assert norm._forward_method("x", "residual") == ("product", "sum")
    assert calls == [(0, ("normed", "x"), given.bias), ("x", "residual", "w", 1e-6, given.bias)]
    x = torch.zeros(2)
    assert given.quant_method.apply(given, x) is x, "it is the product already"


@pytest.mark.parametrize(
    ("settings", "layers", "norms"),
    [
        ({}, True, True),
        ({"lora_config": "any"}, False, True),
        ({"passes": {"fuse_allreduce_rms": True}}, True, False),
        ({"passes": {"enable_sp": True}}, True, False),
    ],
    ids=str,
)
def test_what_vllm_itself_does_with_layers_and_norms_decides(monkeypatch, settings, layers, norms):
    import vllm.config

    passes = SimpleNamespace(**settings.get("passes", {}))
    config = SimpleNamespace(
        lora_config=settings.get("lora_config"),
        additional_config={},
        compilation_config=SimpleNamespace(pass_config=passes),
    )
    monkeypatch.setattr(vllm.config, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(vllm.config, "get_current_vllm_config_or_none", lambda: config)
    assert compat.may_change_layers() == layers
    assert compat.may_change_norms() == norms
    compat.tell_compiler("fused", "1 norm")
    compat.tell_compiler("decoded", {"NAME": "2"})
    assert config.additional_config == {"pairquant": {"fused": "1 norm", "decoded": {"NAME": "2"}}}


def test_without_a_configuration_nothing_is_changed():
    assert not compat.may_change_layers()


def test_the_variable_is_0_or_1():
    assert fusion.wanted("1")
    assert not fusion.wanted("0")
    with pytest.raises(ConfigError, match=r"PAIRQUANT_FUSE is 'no', allowed: 0, 1\. Unset it"):
        fusion.wanted("no")
