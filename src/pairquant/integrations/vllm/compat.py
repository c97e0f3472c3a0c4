"""All that we take from vLLM, in one place: what another version has moved or renamed is mended here.

Versions that were run: see the table in docs/serving.md.
"""

from __future__ import annotations

from vllm.model_executor.layers import quantization as _quantization
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.transformers_utils.config import get_safetensors_params_metadata

__all__ = [
    "GroupQuantScaleParameter",
    "LinearBase",
    "LinearMethodBase",
    "PackedvLLMParameter",
    "QuantizationConfig",
    "UnquantizedLinearMethod",
    "is_registered",
    "register_quantization_config",
    "register_weight_loader_v2_supported_method",
    "tensor_names",
]


def is_registered(method: str) -> bool:
    """Whether vLLM knows this quantization method from a plugin."""
    return method in _quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG


def tensor_names(model: str, revision: str | None) -> frozenset[str]:
    """Of the safetensors files of a directory or hub name, from their headers; empty where they cannot be read."""
    return frozenset(get_safetensors_params_metadata(model, revision=revision))
