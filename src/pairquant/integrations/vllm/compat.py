"""All that we take from vLLM, in one place: what another version has moved or renamed is mended here.

Versions that were run: see the table in docs/serving.md. Names are looked up on first use: what a process needs to know
our quantization method is loaded by vLLM anyway, its linear layers take seconds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

#: Name → module of vLLM that has it.
HOMES = {
    "LinearBase": "model_executor.layers.linear",
    "LinearMethodBase": "model_executor.layers.linear",
    "UnquantizedLinearMethod": "model_executor.layers.linear",
    "register_weight_loader_v2_supported_method": "model_executor.layers.linear",
    "register_quantization_config": "model_executor.layers.quantization",
    "QuantizationConfig": "model_executor.layers.quantization.base_config",
    "FusedMoEMethodBase": "model_executor.layers.fused_moe.fused_moe_method_base",
    "UnquantizedFusedMoEMethod": "model_executor.layers.fused_moe.unquantized_fused_moe_method",
    "GroupQuantScaleParameter": "model_executor.parameter",
    "PackedvLLMParameter": "model_executor.parameter",
    "RMSNorm": "model_executor.layers.layernorm",
    "SiluAndMul": "model_executor.layers.activation",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"vllm.{HOMES[name]}"), name)


def is_experts(layer: Any) -> bool:
    """Return whether a layer of vLLM runs the experts of a block, in a version whose method for them we know."""
    try:
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    except ImportError:
        return False
    return isinstance(layer, RoutedExperts)


def activate_experts(layer: Any, joined: Tensor) -> Tensor:
    """Apply what a layer of experts has between its products, by vLLM's own kernel, as its version wants to be told:
    [A, 2 I] or, without a gate, [A, I] → [A, I].
    """
    from vllm.model_executor.layers.fused_moe import activation as home

    options = {"clamp_limit": layer.swiglu_limit}
    options |= {"alpha": layer.swiglu_alpha} if layer.swiglu_alpha is not None else {}
    options |= {"beta": layer.swiglu_beta} if layer.swiglu_beta is not None else {}
    if hasattr(home, "ApplyMoEActivationConfig"):  # vLLM 0.32, not 0.26
        names = ("activation_situ_beta", "activation_situ_linear_beta")
        options |= {name: getattr(layer.moe_config, name) for name in names}
        options = {"activation_config": home.ApplyMoEActivationConfig(**options)}
    kind = layer.activation
    out = joined.new_empty(len(joined), joined.shape[1] // (2 if kind.is_gated else 1))
    return home.apply_moe_activation(kind, out, joined, **options)


def is_head(layer: Any) -> bool:
    """Return whether a layer of vLLM is an output embedding."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return isinstance(layer, ParallelLMHead)


def is_embedding(layer: Any) -> bool:
    """Return whether a layer of vLLM is an input embedding."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    return isinstance(layer, VocabParallelEmbedding) and not is_head(layer)


def is_registered(method: str) -> bool:
    """Return whether vLLM knows this quantization method from a plugin."""
    from vllm.model_executor.layers import quantization

    return method in quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG


def tensor_names(model: str, revision: str | None) -> frozenset[str]:
    """Return the names of the tensors in a model's safetensors files, from their headers; none where they cannot be read."""
    from vllm.transformers_utils.config import get_safetensors_params_metadata

    return frozenset(get_safetensors_params_metadata(model, revision=revision))


def follow_checkpoints(sort_out: Callable[[Iterable, Any, Any, Any], Iterable]) -> None:
    """Have what vLLM's default loader reads pass through `sort_out`. Idempotent.

    sort_out: (names and tensors, model, vLLM's quantization configuration, dtype of weights) → names and tensors. vLLM has no
    hook between a checkpoint and its models, whose own loaders know packed experts by no common names.
    """
    from vllm.config import get_current_vllm_config_or_none
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    if getattr(DefaultModelLoader.get_all_weights, "followed", False):
        return
    read = DefaultModelLoader.get_all_weights

    def get_all_weights(self: Any, model_config: Any, model: Any) -> Any:
        current = get_current_vllm_config_or_none()
        return sort_out(read(self, model_config, model), model, current and current.quant_config, model_config.dtype)

    get_all_weights.followed = True  # type: ignore[attr-defined]
    DefaultModelLoader.get_all_weights = get_all_weights


def may_change_layers() -> bool:
    """Return whether layers of the model that is being loaded may run together: not if LoRA adapters read what lies between
    them, nor if vLLM has not said what it is loading.
    """
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    return config is not None and config.lora_config is None and isinstance(config.additional_config, dict)


def may_change_norms() -> bool:
    """Return whether vLLM's compiler leaves norms alone. With several GPUs it can compute them together with the exchange of sums,
    or have each GPU compute those of a part of the tokens.
    """
    from vllm.config import get_current_vllm_config

    passes = get_current_vllm_config().compilation_config.pass_config
    return not any(getattr(passes, name, False) for name in ("fuse_allreduce_rms", "enable_sp"))


def tell_compiler(subject: str, change: str | dict[str, str]) -> None:
    """Have vLLM keep the compiled graphs of the model that is being loaded apart from those with another change of this subject.

    Its cache of graphs knows the model's files and configuration, but not what plugins make of the layers. Does nothing while
    no model is loaded, nor where a platform's plugin has put an object of its own in the place of the dict; our kernels run
    on none of those platforms.
    """
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is not None and isinstance(config.additional_config, dict):
        config.additional_config.setdefault("pairquant", {})[subject] = change
