"""All that we take from vLLM, in one place: what another version has moved or renamed is mended here.

Versions that were run: see the table in docs/serving.md. Names are looked up on first use: what a process needs to know
our quantization method is loaded by vLLM anyway, its linear layers take seconds.
"""

from __future__ import annotations

import importlib
from typing import Any

#: Name → module of vLLM that has it.
HOMES = {
    "LinearBase": "model_executor.layers.linear",
    "LinearMethodBase": "model_executor.layers.linear",
    "UnquantizedLinearMethod": "model_executor.layers.linear",
    "register_weight_loader_v2_supported_method": "model_executor.layers.linear",
    "register_quantization_config": "model_executor.layers.quantization",
    "QuantizationConfig": "model_executor.layers.quantization.base_config",
    "FusedMoEMethodBase": "model_executor.layers.fused_moe.fused_moe_method_base",
    "apply_moe_activation": "model_executor.layers.fused_moe.activation",
    "UnquantizedFusedMoEMethod": "model_executor.layers.fused_moe.unquantized_fused_moe_method",
    "GroupQuantScaleParameter": "model_executor.parameter",
    "PackedvLLMParameter": "model_executor.parameter",
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


def is_registered(method: str) -> bool:
    """Return whether vLLM knows this quantization method from a plugin."""
    from vllm.model_executor.layers import quantization

    return method in quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG


def tensor_names(model: str, revision: str | None) -> frozenset[str]:
    """Return the names of the tensors in a model's safetensors files, from their headers; none where they cannot be read."""
    from vllm.transformers_utils.config import get_safetensors_params_metadata

    return frozenset(get_safetensors_params_metadata(model, revision=revision))
