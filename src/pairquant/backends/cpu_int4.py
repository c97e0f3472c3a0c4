"""The backend for 4-bit layers in bfloat16 on CPUs: one small matrix per group rotates, PyTorch's products multiply."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.run import cpu
from ..kernels.run.cpu import INT4_ROWS, CpuWeights
from ..kernels.run.decoded_budget import budget
from ..spec.fields import short
from ..spec.linear import LinearLayout, PackedLinear
from .base import Backend
from .operators import fake, operator


class CpuInt4(Backend):
    """PyTorch's int4 product, and for more tokens decoded tiles of rows (`kernels.run.cpu`).

    Linears that read the same input run at once: those with the same transform as one product, others after one rotation.
    """

    name = "cpu-int4"
    most = 1_000
    dtypes = (torch.bfloat16,)
    joins = True

    def refusal(self, layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"runs on CPUs, not on {device.type}"
        if layout.weights is not None:
            return f"multiplies whole numbers of 4 bits, and the layer's weights are {layout.weights}"
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
        if any(self._size(run) % INT4_ROWS for run in _runs(linears)):
            return [[linear] for linear in linears]
        return [list(linears)]

    def prepare(self, linears: Sequence[PackedLinear], dtype: torch.dtype) -> list[Tensor]:
        keep = self._keeps_decoded(linears)
        try:
            parts = [self._prepared(run, keep) for run in _runs(linears)]
        except BaseException:
            if keep:
                budget("cpu").give_back(self._decoded_bytes(linears))
            raise
        for part in parts if keep else ():
            budget("cpu").give_back_with(part.codes[0].dense)
        return (cpu.joined(parts) if len(parts) > 1 else parts[0]).tensors()

    def channels(self, tensors: Sequence[Tensor], group_size: int) -> int:
        return tensors[0].shape[1] * group_size

    def compute(
        self,
        x: Tensor,
        tensors: Sequence[Tensor],
        bias: Tensor | None,
        sizes: Sequence[int],
        group_size: int,
        activations: str | None = None,
    ) -> Tensor:
        return cpu.rotated_linear(x, CpuWeights.of(tensors), bias, group_size, activations)

    def input_gradient(self, grad: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int], group_size: int) -> Tensor:
        weights = CpuWeights.of(tensors)
        parts = grad.split([len(codes.packed) for codes in weights.codes], dim=-1)
        decoded = [cpu.decode(*pair, group_size) for pair in zip(weights.matrix, weights.codes, strict=True)]
        return sum(part @ weight.to(grad.dtype) for part, weight in zip(parts, decoded, strict=True))

    @staticmethod
    def _prepared(run: Sequence[PackedLinear], keep: bool) -> CpuWeights:
        """Prepare linears of the same transform as one; keep: see `cpu_weights`."""
        return CpuWeights.of(torch.ops.pairquant.cpu_weights(*as_one(run), keep))

    def _keeps_decoded(self, linears: Sequence[PackedLinear]) -> bool:
        """Tell whether the decoded weights of these linears are kept, and take their bytes from the budget.

        They are not while torch.compile traces, which would count them in a graph's place, nor where they would be slower or
        where activations are rounded, which happens in the rotated basis.
        """
        rounds = any(linear.layout.activations is not None for linear in linears)
        if torch.compiler.is_compiling() or not cpu.multiplies_bfloat16() or rounds:
            return False
        return budget("cpu").take(self._decoded_bytes(linears))

    def _decoded_bytes(self, linears: Sequence[PackedLinear]) -> int:
        return self._size(linears) * linears[0].layout.in_features * torch.bfloat16.itemsize

    @staticmethod
    def _size(run: Sequence[PackedLinear]) -> int:
        return sum(linear.layout.out_features for linear in run)


def as_one(linears: Sequence[PackedLinear]) -> tuple[list[Tensor], list[int]]:
    """Return the stored tensors, without bias, of linears that have the same transform, as those of one linear, and the
    `numbers()` of its layout."""
    parts = [PackedLinear(linear.layout.without_bias(), linear.tensors) for linear in linears]
    whole = PackedLinear.joined(parts) if len(parts) > 1 else parts[0]
    return [whole[name] for name in whole.layout.fields()], whole.layout.numbers()


def _runs(linears: Sequence[PackedLinear]) -> list[list[PackedLinear]]:
    """Split linears that read the same input into runs of neighbours that have the same transform."""
    runs = [[linears[0]]]
    for linear in linears[1:]:
        if linear.shares_transform_with(runs[-1][0]):
            runs[-1].append(linear)
        else:
            runs.append([linear])
    return runs


@operator("cpu_weights")
def cpu_weights(stored: list[Tensor], layout: list[int], keep_decoded: bool) -> list[Tensor]:
    """Prepare a 4-bit linear for the CPU and return `CpuWeights.tensors()`.

    stored: all tensors of its `layout.fields()`, without bias; layout: the layout's `numbers()`; keep_decoded: see `cpu.build`.
    """
    known = LinearLayout.of_numbers(layout)
    return cpu.build(PackedLinear(known, dict(zip(known.fields(), stored, strict=True))), keep_decoded).tensors()


@fake("cpu_weights")
def _(stored, layout, keep_decoded):
    known = LinearLayout.of_numbers(layout)
    groups, g = known.num_groups, known.group_size
    rows = groups * known.out_features if cpu.multiplies_bfloat16() and not keep_decoded else 0
    return [
        stored[0].new_empty(1, groups, g, g if known.rotations else 1, dtype=torch.float32),
        stored[0].new_empty(known.out_features, known.in_features // 2, dtype=torch.uint8),
        stored[0].new_empty(groups, known.out_features, 2, dtype=torch.bfloat16),
        stored[0].new_empty(rows, g // 2 + 4, dtype=torch.uint8),
        stored[0].new_empty(known.out_features if keep_decoded else 0, known.in_features, dtype=torch.bfloat16),
    ]
