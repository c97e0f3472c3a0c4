"""Sources that are published in few bits: tensors stored as codes and scales, read as the bfloat16 tensors they stand for.

Two ways are known: 8-bit floats with a scale for each block of 128 × 128 (DeepSeek V3 and others), and MXFP4, 4-bit floats with a
power of two for each 32 of them (gpt-oss's experts; OCP Microscaling Formats 1.0, section 5.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..spec.fields import Field
from ..spec.mx import E2M1, E8M0_BIAS, MX_BLOCK
from ..support.errors import CheckpointError

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Scaled:
    """codes, scales: names of the stored tensors; decode: of the two."""

    codes: str
    scales: str
    decode: Callable[[Tensor, Tensor], Tensor]


def take_out(fields: dict[str, Field], homes: dict[str, Path]) -> dict[str, Scaled]:
    """Put in the place of codes and scales, in `fields`, the bfloat16 tensors that they stand for; `homes` gets their files.

    Returns the tensor's name → how it is stored. Raises `CheckpointError` for 8-bit floats without scales, which stand for
    nothing known.
    """
    found: dict[str, Scaled] = {}
    for name, field in list(fields.items()):
        if field.dtype == FP8:
            found[name] = Scaled(name, f"{name}_scale_inv", from_fp8)
            scales = fields.pop(found[name].scales, None)
            if scales is None or len(field.shape) != 2 or len(scales.shape) != 2:
                raise CheckpointError(
                    f"tensor {name} in {homes[name]} is F8_E4M3: the weights are quantized to 8-bit floats already, without "
                    f"scales of their blocks ({found[name].scales}), which is not supported. Use the original model in 16 bits."
                )
            fields[name] = Field(torch.bfloat16, field.shape)
        elif name.endswith("_blocks") and field.dtype == torch.uint8 and field.shape[-1:] == (MX_BLOCK // 2,):
            base = name.removesuffix("_blocks")
            if f"{base}_scales" in fields and len(field.shape) == 4:
                experts, rows, blocks, _ = field.shape
                found[base] = Scaled(name, f"{base}_scales", from_mxfp4)
                del fields[name], fields[f"{base}_scales"]
                fields[base] = Field(torch.bfloat16, (experts, blocks * MX_BLOCK, rows))
                homes[base] = homes[name]
    return found


def from_fp8(codes: Tensor, scales: Tensor) -> Tensor:
    """Decode 8-bit floats [N, C] with scales [⌈N / n⌉, ⌈C / c⌉] of blocks n × c: bfloat16 [N, C]."""
    rows, columns = (_block(size, count) for size, count in zip(codes.shape, scales.shape, strict=True))
    spread = scales.float().repeat_interleave(rows, 0)[: len(codes)].repeat_interleave(columns, 1)
    return (codes.float() * spread[:, : codes.shape[1]]).bfloat16()


def _block(size: int, count: int) -> int:
    """Return the size of `count` blocks of which the last may be smaller: 128 in every model of this kind so far."""
    return 128 if -(-size // 128) == count else -(-size // count)


def from_mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """Decode MXFP4: uint8 codes [E, N, B, 16], the lower four bits first, and exponents [E, N, B]: bfloat16 [E, 32 B, N].

    It is the order in which gpt-oss multiplies: experts, input channels, output rows.
    """
    table = torch.tensor(E2M1, dtype=torch.bfloat16, device=codes.device)
    values = torch.stack((table[(codes & 15).long()], table[(codes >> 4).long()]), -1).flatten(-2)
    whole = torch.ldexp(values, scales.int()[..., None] - E8M0_BIAS).flatten(-2)
    return whole.transpose(1, 2).contiguous()
