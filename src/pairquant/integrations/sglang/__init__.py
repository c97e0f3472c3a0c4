"""SGLang: our checkpoints run there after `pip install pairquant`, without a flag (SGLang 0.5.23).

SGLang calls `register`, the entry point in its group `sglang.srt.plugins`, in each of its processes.
"""

from __future__ import annotations


def register() -> None:
    """Make SGLang know the quantization method `paroquant`. Idempotent."""
    from ...spec.checkpoint import QUANT_METHOD
    from .compat import add_method
    from .config import PairQuantConfig

    add_method(QUANT_METHOD, PairQuantConfig)
