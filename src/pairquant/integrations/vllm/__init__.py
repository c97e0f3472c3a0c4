"""vLLM: our checkpoints run there after `pip install pairquant[vllm]`, without a flag (vLLM 0.32 and later).

vLLM calls `register`, the entry point in its group `vllm.general_plugins`, in each of its processes.
"""

from __future__ import annotations


def register() -> None:
    """Make vLLM know the quantization method `paroquant`. Idempotent; loads nothing that runs layers."""
    from ...spec.checkpoint import QUANT_METHOD
    from .compat import is_registered, register_quantization_config

    if not is_registered(QUANT_METHOD):
        from .config import PairQuantConfig

        register_quantization_config(QUANT_METHOD)(PairQuantConfig)
