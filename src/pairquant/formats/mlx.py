"""MLX's affine format, which mlx-lm runs on Apple's chips."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.packing import pack
from ..spec.linear import LinearLayout, PackedLinear, Spec
from .base import Contents, Format, codes_of


class Mlx(Format):
    """weight uint32 [N, C · b / 32], scales and biases float16 [N, G]: w = scale · q + bias, so that bias = -z · s."""

    name = "mlx"
    readers = "mlx-lm"
    command = "mlx_lm.chat --model {}"
    bits = (2, 3, 4, 5, 6, 8)
    embeddings = True
    stacks = ("glm4_moe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")

    def refusal(self, layout: LinearLayout) -> str | None:
        words = layout.in_features * layout.bits
        if words % 32:
            return f"has {layout.in_features} channels of {layout.bits} bits, which fill no whole words"
        return super().refusal(layout)

    def stack_name(self, home: str, part: str, stored: str) -> str:
        return f"{home.removesuffix('.experts')}.switch_mlp.{part}"

    def tensors(self, packed: PackedLinear) -> dict[str, Tensor]:
        codes, zeros, scales = codes_of(packed)
        return {
            "weight": pack(codes, packed.layout.bits, natural=True).view(torch.uint32),
            "scales": scales,
            "biases": (-(zeros.float() * scales.float())).half(),
        }

    def entries(self, contents: Contents) -> dict[str, Any]:
        usual = contents.common.spec
        layers = {path: _form(layout.spec) for path, layout in contents.layouts.items() if layout.spec != usual}
        return {"quantization": {**_form(usual), **layers}}


def _form(spec: Spec) -> dict[str, Any]:
    return {"group_size": spec.group_size, "bits": spec.bits, "mode": "affine"}
