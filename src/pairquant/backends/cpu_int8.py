"""The backend for 4-bit layers with int8 activations in bfloat16 on CPUs: products of 8-bit integers from 16 tokens on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.run import cpu_int8, row_scales
from ..kernels.run.cpu_int8 import Int8Weights
from ..spec.linear import LinearLayout, PackedLinear
from .cpu_int4 import CpuInt4, as_one
from .operators import fake, operator


class CpuInt8(CpuInt4):
    """PyTorch's int8 product. Takes twelve bits a weight: the codes for few tokens, and whole numbers of 8 bits for more.

    Layers whose group scales differ too much are multiplied by the codes throughout (`kernels.run.row_scales`), with a warning.
    """

    name = "cpu-int8"

    def batches(self, linears: Sequence[PackedLinear]) -> list[list[PackedLinear]]:
        if all(linear.shares_transform_with(linears[0]) for linear in linears[1:]):
            return super().batches(linears)
        return [[linear] for linear in linears]

    def refusal(self, layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type == "cpu" and layout.activations != "int8":
            return f"multiplies int8 activations, the layer's are {layout.activations or 'not rounded'}"
        if device.type == "cpu" and not cpu_int8.products_are_exact():
            return "needs a CPU with VNNI or AMX: on this one PyTorch's products of int8 numbers overflow"
        return super().refusal(layout, device, dtype)

    def simulates(self, layout: LinearLayout, device: torch.device) -> bool:
        return False

    def prepare(self, linears: Sequence[PackedLinear], dtype: torch.dtype) -> list[Tensor]:
        tensors = torch.ops.pairquant.cpu_int8_weights(*as_one(linears))
        if not torch.compiler.is_compiling() and not Int8Weights.of_tensors(tensors).suffice:
            warnings.warn(f"{self.name}: {row_scales.WARNING}", stacklevel=2)
        return tensors

    def compute(
        self,
        x: Tensor,
        tensors: Sequence[Tensor],
        bias: Tensor | None,
        sizes: Sequence[int],
        group_size: int,
        activations: str | None = None,
    ) -> Tensor:
        return cpu_int8.rotated_linear(x, Int8Weights.of_tensors(list(tensors)), bias, group_size)

    def input_gradient(self, grad: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int], group_size: int) -> Tensor:
        return super().input_gradient(grad, Int8Weights.of_tensors(list(tensors)).int4.tensors(), sizes, group_size)


@operator("cpu_int8_weights")
def cpu_int8_weights(stored: list[Tensor], layout: list[int]) -> list[Tensor]:
    """Prepare a 4-bit linear and return `Int8Weights.tensors()`; for the arguments see `cpu_int4.cpu_weights`."""
    known = LinearLayout.of_numbers(layout)
    return Int8Weights.build(PackedLinear(known, dict(zip(known.fields(), stored, strict=True)))).tensors()


@fake("cpu_int8_weights")
def _(stored, layout):
    known = LinearLayout.of_numbers(layout)
    groups, g = known.num_groups, known.group_size
    return [
        stored[0].new_empty(1, groups, g, g if known.rotations else 1, dtype=torch.float32),
        stored[0].new_empty(known.out_features, known.in_features // 2, dtype=torch.uint8),
        stored[0].new_empty(groups, known.out_features, 2, dtype=torch.bfloat16),
        stored[0].new_empty(0, g // 2 + 4, dtype=torch.uint8),
        stored[0].new_empty(0, known.in_features, dtype=torch.bfloat16),
        stored[0].new_empty(known.in_features, known.out_features, dtype=torch.int8),
        stored[0].new_empty(known.out_features, dtype=torch.float32),
        stored[0].new_empty((), dtype=torch.bool),
    ]
