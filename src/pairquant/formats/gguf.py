"""The block types of GGUF files that hold our codes: 32 weights with a scale, and unless symmetric a minimum, z·s in float16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec.linear import LinearLayout, PackedLinear
from .base import Contents, Format, codes_of

#: Weights of a block.
BLOCK = 32
#: Bits and whether symmetric → the type's name.
TYPES = {(4, True): "Q4_0", (4, False): "Q4_1", (5, True): "Q5_0", (5, False): "Q5_1", (8, True): "Q8_0"}


class Gguf(Format):
    """weight uint8 [N, bytes]: C / 32 blocks a row, each the bytes of (llama.cpp, ggml-common.h)

    Q4_0: scale d, float16, then 16 bytes, byte i of which holds codes i and i + 16; w = d (q - 8). Q4_1: d and m, both
    float16, then the same; w = d q + m. Q5_0, Q5_1: after these the fifth bits of all codes in a word, then the same bytes.
    Q8_0: d and 32 signed bytes. A larger group of ours becomes blocks with the same scale.
    """

    name = "gguf"
    readers = "llama.cpp, Ollama, LM Studio"
    command = "llama-cli -m {}"
    bits = (4, 5, 8)
    group_size = BLOCK
    embeddings = True
    stacks = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")

    def refusal(self, layout: LinearLayout) -> str | None:
        if layout.bits == 8 and not layout.spec.symmetric:
            return "has 8 bits with zero points, gguf holds 8 bits without them (--symmetric)"
        return super().refusal(layout)

    def tensors(self, packed: PackedLinear) -> dict[str, Tensor]:
        codes, zeros, scales = codes_of(packed)
        bits, symmetric = packed.layout.bits, packed.layout.spec.symmetric
        repeats = packed.layout.group_size // BLOCK
        blocks = codes.unflatten(1, (-1, BLOCK))
        parts = [_bytes(scales.repeat_interleave(repeats, 1))]
        if not symmetric:
            minimum = -(zeros.float() * scales.float())
            parts.append(_bytes(minimum.half().repeat_interleave(repeats, 1)))
        if bits == 8:
            parts.append((blocks.to(torch.int16) - 128).to(torch.int8).view(torch.uint8))
        if bits == 5:
            parts.append(_fifth_bits(blocks))
        if bits < 8:
            low = blocks & 15
            parts.append(low[..., :16] | low[..., 16:] << 4)
        return {"weight": torch.cat(parts, -1).flatten(1)}

    def entries(self, contents: Contents) -> dict[str, Any]:
        return {}

    @staticmethod
    def type_of(layout: LinearLayout) -> str:
        """Return the name of the block type that holds a weight."""
        return TYPES[layout.bits, layout.spec.symmetric]


def _bytes(halves: Tensor) -> Tensor:
    """Return float16 [N, B] as bytes, uint8 [N, B, 2], the low one first."""
    return halves.contiguous().view(torch.uint8).unflatten(1, (-1, 2))


def _fifth_bits(blocks: Tensor) -> Tensor:
    """Return bit 4 of codes [N, B, 32] in bytes, uint8 [N, B, 4], that of code i in bit i % 8 of byte i / 8."""
    bits = (blocks >> 4).unflatten(-1, (4, 8)).int()
    places = torch.arange(8, device=blocks.device)
    return (bits << places).sum(-1).to(torch.uint8)
