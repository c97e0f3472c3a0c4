"""The format `pack-quantized` of compressed-tensors, which llm-compressor writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.packing import pack
from ..spec.linear import LinearLayout, PackedLinear, Spec
from .base import Contents, Format, codes_of


class CompressedTensors(Format):
    """weight_packed int32 [N, C · b / 32], weight_scale float16 [N, G], weight_shape int64 [2], and unless symmetric
    weight_zero_point int32 [N · b / 32, G]. Codes and zero points are those of ours; the format calls them signed, less 2^(b-1).
    """

    name = "compressed-tensors"
    readers = "vLLM, SGLang, Transformers with compressed-tensors"
    command = "vllm serve {}"
    bits = (4, 8)

    def tensors(self, packed: PackedLinear) -> dict[str, Tensor]:
        layout = packed.layout
        codes, zeros, scales = codes_of(packed)
        found = {
            "weight_packed": pack(codes, layout.bits, natural=True),
            "weight_scale": scales,
            "weight_shape": torch.tensor([layout.out_features, layout.in_features], device=codes.device),
        }
        if not layout.spec.symmetric:
            found["weight_zero_point"] = pack(zeros.T.contiguous(), layout.bits, natural=True).T.contiguous()
        return found

    def entries(self, contents: Contents) -> dict[str, Any]:
        return {
            "quantization_config": {
                "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
                "config_groups": _groups(contents.layouts, contents.common.spec), "ignore": list(contents.plain),
            }
        }  # fmt: skip


def _groups(layouts: Mapping[str, LinearLayout], common: Spec) -> dict[str, Any]:
    """Return one group for each form: the most frequent stands for all linears, the others name their own."""
    members: dict[Spec, list[str]] = {}
    for path, layout in layouts.items():
        members.setdefault(layout.spec, []).append(path)
    usual = max(members, key=lambda spec: len(members[spec]))
    ordered = sorted(members, key=lambda spec: spec == usual)  # readers take the first group that matches
    targets = {
        spec: ["Linear"] if spec == usual else [f"re:^{re.escape(p)}$" for p in members[spec]] for spec in ordered
    }
    return {f"group_{i}": _group(spec, targets[spec]) for i, spec in enumerate(ordered)}


def _group(spec: Spec, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": spec.bits, "type": "int", "symmetric": spec.symmetric, "strategy": "group", "group_size": spec.group_size,
        "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}
