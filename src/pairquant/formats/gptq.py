"""GPTQ's format: codes packed along the input channels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.packing import pack
from ..spec.linear import LinearLayout, PackedLinear
from .base import Contents, Format, codes_of

#: Layers that vLLM merges, by their common name.
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Gptq(Format):
    """qweight int32 [C · b / 32, N], qzeros int32 [G, N · b / 32], scales float16 [G, N], g_idx int32 [C].

    Symmetric codes are stored in the first version, whose zero points are one less, and which every reader knows. Others
    may have a zero point of 0, which only the second version (`gptq_v2`) holds.
    """

    name = "gptq"
    readers = "vLLM, SGLang, Transformers with GPTQModel"
    command = "vllm serve {}"
    bits = (2, 3, 4, 8)
    symmetric = True
    one_form = True

    def tensors(self, packed: PackedLinear) -> dict[str, Tensor]:
        layout = packed.layout
        codes, zeros, _ = codes_of(packed)
        less = int(layout.spec.symmetric)
        return {
            "qweight": pack(codes, layout.bits, natural=True).T.contiguous(),
            "qzeros": pack(zeros.T.contiguous() - less, layout.bits, natural=True),
            "scales": packed["scales"],
            "g_idx": _group_of_channel(layout, codes.device),
        }

    def entries(self, contents: Contents) -> dict[str, Any]:
        spec = contents.common.spec
        version = "gptq" if spec.symmetric else "gptq_v2"
        quantization: dict[str, Any] = {
            "quant_method": "gptq", "checkpoint_format": version, "bits": spec.bits, "group_size": spec.group_size,
            "sym": spec.symmetric, "desc_act": False, "lm_head": False,
        }  # fmt: skip
        if contents.plain:
            quantization["dynamic"] = {
                f"-:^{re.escape(path)}$": {} for path in (*contents.plain, *_merged(contents.plain))
            }
        return {"quantization_config": quantization}


def _merged(plain: Sequence[str]) -> list[str]:
    """Return the names under which vLLM looks layers up that it merges, where all of their parts are plain."""
    found = []
    for merged, parts in MERGED.items():
        for path in plain:
            place, _, last = path.rpartition(".")
            if last == parts[0] and all(f"{place}.{part}" in plain for part in parts):
                found.append(f"{place}.{merged}")
    return found


def _group_of_channel(layout: LinearLayout, device: torch.device) -> Tensor:
    return torch.arange(layout.in_features, dtype=torch.int32, device=device) // layout.group_size
