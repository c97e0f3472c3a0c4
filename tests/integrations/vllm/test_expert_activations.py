"""What is computed between the products of vLLM's experts, against vLLM's own layers and formulas."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("vllm", reason="needs vLLM")

from pairquant.integrations.vllm.expert_activations import _interleaved, between, known_activation

CPU = torch.device("cpu")


def layer(name, limit=None, alpha=None, beta=None):
    kind = SimpleNamespace(value=name)
    return SimpleNamespace(activation=kind, swiglu_limit=limit, swiglu_alpha=alpha, swiglu_beta=beta)


@pytest.fixture
def joined(generator):
    """Gates, then ups, some beyond every limit."""
    return 6 * torch.randn(5, 16, generator=generator)


@pytest.mark.parametrize(
    ("name", "limit", "known"), [("silu", None, "silu"), ("silu", 7.0, ""), ("swigluoai", None, "")]
)
def test_a_limit_makes_it_another_activation(name, limit, known):
    assert known_activation(layer(name, limit)) == known


def test_that_of_gpt_oss_is_transformers_own(joined):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    wanted = GptOssExperts._apply_gate(SimpleNamespace(alpha=1.702, limit=7.0), _interleaved(joined))
    torch.testing.assert_close(between(layer("swigluoai"), CPU)(joined), wanted)
    stated = layer("swigluoai_uninterleave", limit=7.0, alpha=1.702, beta=1.0)
    torch.testing.assert_close(between(stated, CPU)(joined), wanted)


def test_those_without_numbers_of_their_own(joined):
    gate, up = joined.chunk(2, -1)
    wanted = F.silu(gate.clamp(max=3.0)) * up.clamp(-3.0, 3.0)
    for name in ("silu", "swigluoai_uninterleave"):
        torch.testing.assert_close(between(layer(name, limit=3.0), CPU)(joined), wanted)
    torch.testing.assert_close(between(layer("relu2_no_mul"), CPU)(joined), joined.relu() ** 2)
    torch.testing.assert_close(between(layer("silu_no_mul"), CPU)(joined), F.silu(joined))


def test_what_nothing_computes_on_a_cpu():
    assert between(layer("swiglustep"), CPU) is None
    assert between(layer("situ"), CPU) is None


def test_vllms_own_kernels_are_told_what_the_layer_says(joined, monkeypatch):
    """On GPUs; its kernel is replaced by one that remembers."""
    from vllm.model_executor.layers.fused_moe import activation as home

    seen = []
    monkeypatch.setattr(
        home, "apply_moe_activation", lambda *given, **options: seen.append((given, options)) or given[1]
    )
    one = layer("swigluoai", limit=5.0, alpha=1.5)
    one.activation = home.MoEActivation.SWIGLUOAI
    one.moe_config = SimpleNamespace(activation_situ_beta=None, activation_situ_linear_beta=None)
    assert between(one, torch.device("cuda"))(joined).shape == (5, 8)
    ((kind, _, told), options), gate = seen[0], joined[:, :8]
    assert kind is home.MoEActivation.SWIGLUOAI
    assert torch.equal(told[:, ::2], gate)
    config = options["activation_config"]
    assert (config.clamp_limit, config.alpha, config.beta) == (5.0, 1.5, 0.0)
