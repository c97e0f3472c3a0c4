"""All that we take from SGLang, in one place: what another version has moved or renamed is mended here.

Versions that were run: see the table in docs/serving.md.
"""

from __future__ import annotations

import importlib
from typing import Any

#: Name → module of SGLang that has it.
HOMES = {
    "FusedMoE": "layers.moe.fused_moe_triton",
    "LinearBase": "layers.linear",
    "LinearMethodBase": "layers.quantization.base_config",
    "QuantizationConfig": "layers.quantization.base_config",
    "UnquantizedLinearMethod": "layers.quantization.unquant",
    "VocabParallelEmbedding": "layers.vocab_parallel_embedding",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"sglang.srt.{HOMES[name]}"), name)


def add_method(name: str, config: type) -> None:
    """Enter a quantization method into SGLang's tables: by name, of CPUs with AMX, and of `--quantization`."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers import quantization

    quantization.QUANTIZATION_METHODS[name] = config
    quantization.CPU_QUANTIZATION_METHODS[name] = config
    if name not in choices.QUANTIZATION_CHOICES:
        choices.add_quantization_method_choices([name])


def rank_and_size(layer: Any, group: str = "tp_group") -> tuple[int, int]:
    """Return a layer's rank in one of its groups of processes and their number: (0, 1) where it has none."""
    from sglang.srt.distributed.utils import get_group_rank_size

    return get_group_rank_size(getattr(layer, group, None))


def pipeline_stages() -> int:
    """Return over how many pipeline stages SGLang spreads the model."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().pp_size


def place_of_downloads(model: str) -> tuple[str | None, str | None]:
    """Return the revision of a hub name that SGLang was asked for, and where it keeps what it downloads; None: as usual."""
    from sglang.srt.runtime_context import get_model, get_spec

    asked = get_model()
    drafts = model != asked.model_path
    return get_spec().speculative_draft_model_revision if drafts else asked.revision, asked.download_dir
