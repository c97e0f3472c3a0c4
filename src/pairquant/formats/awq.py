"""AWQ's format: at 4 bits, that of our checkpoints without the transform."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..spec.linear import PackedLinear
from .base import Contents, Format


class Awq(Format):
    """`version: gemm` of AutoAWQ: qweight int32 [C, N / 8], qzeros int32 [G, N / 8], scales float16 [G, N]."""

    name = "awq"
    readers = "vLLM, SGLang, Transformers with GPTQModel"
    command = "vllm serve {}"
    bits = (4,)
    one_form = True

    def tensors(self, packed: PackedLinear) -> dict[str, Tensor]:
        return {name: packed[name] for name in ("qweight", "qzeros", "scales")}

    def entries(self, contents: Contents) -> dict[str, Any]:
        quantization = {
            "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": contents.common.group_size, "zero_point": True,
            "modules_to_not_convert": list(contents.plain),
        }  # fmt: skip
        return {"quantization_config": quantization}
