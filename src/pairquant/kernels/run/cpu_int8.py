"""Run layers with int8 activations on a CPU: from some tokens on by one product of 8-bit integers.

For it the weight is rounded to int8 in the rotated basis, in units of one scale for each row. With each group's own scale
there would be a product for each group, and adding these up took twice as long as all products (`decisions.md`). For few
tokens PyTorch's int4 product is faster, as it reads half the bytes. It also multiplies more tokens by weights that one scale
for each row does not suffice for (`row_scales`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ...core.activations import rows_int8
from ...core.linear import rotated_weight
from ...spec.linear import PackedLinear
from . import cpu, row_scales
from .cpu import CpuWeights

#: From so many tokens on the integer product is used.
BYTES_FROM = 16


def products_are_exact() -> bool:
    """Tell whether PyTorch's products of int8 numbers are right on this CPU.

    Without VNNI or AMX they add pairs of products in 16 bits, where large ones overflow: at AVX2 such layers had errors of 10 to 20 %.
    torch.compile takes the answer as a constant, as it could not trace what depends on the values of a product.
    """
    return _products_are_exact()


# What `torch.compiler.assume_constant_result` does, which would import torch._dynamo, and Triton with it, for every user.
products_are_exact._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _products_are_exact() -> bool:
    rows, columns = (torch.full(shape, 127, dtype=torch.int8) for shape in ((BYTES_FROM, 256), (256, 64)))
    return bool((torch._int_mm(rows, columns) == 256 * 127 * 127).all())


@dataclass(frozen=True)
class Int8Weights:
    """One 4-bit linear, prepared for both products.

    int4: for few tokens; numbers: int8 [C, N], the weight in units of its row's scale; scales: float32 [N], of the rows;
    suffice: bool [], whether these scales suffice. Without it int4 is for all tokens.
    """

    int4: CpuWeights
    numbers: Tensor
    scales: Tensor
    suffice: Tensor

    @classmethod
    def build(cls, linear: PackedLinear) -> Int8Weights:
        """Prepare a 4-bit linear."""
        numbers, scales = rows_int8(rotated_weight(linear))
        # The input is rotated by a matrix that large scales have made `shrink_of` times as large.
        scales = scales / cpu.shrink_of(linear)
        suffice = torch.tensor(row_scales.suffice(linear, "int8"))
        return cls(cpu.build(linear, many_tokens=False), numbers.T.contiguous(), scales, suffice)

    def tensors(self) -> list[Tensor]:
        """Return all tensors, which `of_tensors` reads."""
        return [*self.int4.tensors(), self.numbers, self.scales, self.suffice]

    @classmethod
    def of_tensors(cls, tensors: list[Tensor]) -> Int8Weights:
        """Return the weights whose `tensors()` is this list."""
        *int4, numbers, scales, suffice = tensors
        return cls(CpuWeights.of(int4), numbers, scales, suffice)


def rotated_linear(x: Tensor, weights: Int8Weights, bias: Tensor | None, group_size: int) -> Tensor:
    """Run a linear on x, bfloat16 [M, C], whose rotation is rounded to int8, with its bias if it has one: bfloat16 [M, N]."""
    if len(x) < BYTES_FROM or not weights.suffice:
        return cpu.rotated_linear(x, weights.int4, bias, group_size, "int8")
    codes, scales = rows_int8(cpu.turned(x, weights.int4.matrix, torch.float32)[0])
    y = torch._int_mm(codes, weights.numbers).float().mul_(scales[:, None]).mul_(weights.scales).to(x.dtype)
    return y if bias is None else y + bias
