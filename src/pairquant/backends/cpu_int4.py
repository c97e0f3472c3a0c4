"""The backend for 4-bit layers in bfloat16 on CPUs: one small matrix per group rotates, PyTorch's int4 product multiplies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.run import cpu
from ..kernels.run.cpu import INT4_ROWS, CpuWeights
from ..spec.fields import short
from ..spec.linear import LinearLayout, PackedLinear
from .base import Backend


class CpuInt4(Backend):
    """PyTorch's int4 product. Linears that read the same input and have the same transform run as one."""

    name = "cpu-int4"
    dtypes = (torch.bfloat16,)

    def refusal(self, layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"runs on CPUs, not on {device.type}"
        if layout.bits != 4:
            return f"multiplies 4-bit weights, the layer has {layout.bits}"
        if dtype not in self.dtypes:
            return f"is fast in bfloat16 only; {short(dtype)} takes 50 times as long"
        if layout.out_features % INT4_ROWS:
            return f"packs {INT4_ROWS} rows together, the layer has {layout.out_features}"
        if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
            return f"needs an int4 product that PyTorch {torch.__version__} does not have"
        return None

    def batches(self, linears: Sequence[PackedLinear]) -> list[list[PackedLinear]]:
        if all(linear.shares_transform_with(linears[0]) for linear in linears[1:]):
            return [list(linears)]
        return [[linear] for linear in linears]

    def prepare(self, linears: Sequence[PackedLinear], dtype: torch.dtype) -> list[Tensor]:
        whole = PackedLinear.joined(linears) if len(linears) > 1 else linears[0]
        stored = [whole[name] for name in whole.layout.without_bias().fields()]
        return torch.ops.pairquant.cpu_weights(stored, whole.layout.numbers())

    def channels(self, tensors: Sequence[Tensor], group_size: int) -> int:
        return len(CpuWeights(*tensors).matrix) * group_size

    def compute(
        self,
        x: Tensor,
        tensors: Sequence[Tensor],
        bias: Tensor | None,
        sizes: Sequence[int],
        group_size: int,
        activations: str | None = None,
    ) -> Tensor:
        return cpu.rotated_linear(x, CpuWeights(*tensors), bias, group_size, activations)

    def input_gradient(self, grad: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int], group_size: int) -> Tensor:
        return grad @ cpu.decode(CpuWeights(*tensors), group_size).to(grad.dtype)


@torch.library.custom_op("pairquant::cpu_weights", mutates_args=())
def cpu_weights(stored: list[Tensor], layout: list[int]) -> list[Tensor]:
    """Prepare a 4-bit linear for the CPU and return `CpuWeights.tensors()`.

    stored: all tensors of its `layout.fields()`, without bias; layout: the layout's `numbers()`.
    """
    known = LinearLayout.of_numbers(layout)
    return CpuWeights.build(PackedLinear(known, dict(zip(known.fields(), stored, strict=True)))).tensors()


@cpu_weights.register_fake
def _(stored, layout):
    known = LinearLayout.of_numbers(layout)
    groups, g = known.num_groups, known.group_size
    return [
        stored[0].new_empty(known.out_features, known.in_features // 2, dtype=torch.uint8),
        stored[0].new_empty(groups, known.out_features, 2, dtype=torch.bfloat16),
        stored[0].new_empty(groups, g, g if known.rotations else 1, dtype=torch.float32),
    ]
