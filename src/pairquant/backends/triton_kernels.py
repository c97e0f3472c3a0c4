"""The backend for NVIDIA GPUs: Triton kernels that run up to three linears of one input in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.availability import device_class, triton_missing
from ..kernels.run import table
from ..kernels.run.weights import MAX_SEGMENTS, KernelWeights
from ..spec.linear import LinearLayout, PackedLinear
from .base import Backend


class TritonKernels(Backend):
    """Triton kernels that rotate, multiply and, for many tokens, decode; their tiles come from a measured table."""

    name = "triton"
    replaces = ("qweight", "qzeros", "scales")
    most = MAX_SEGMENTS

    def refusal(self, layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return f"runs on NVIDIA GPUs, not on {device.type}"
        if layout.activations is not None:
            return f"does not round activations, and the layer's are {layout.activations}"
        return triton_missing()

    def prepare(self, linears: Sequence[PackedLinear], dtype: torch.dtype) -> list[Tensor]:
        from ..kernels.run.launch import with_matrix

        return with_matrix(KernelWeights.build(linears)).tensors()

    def channels(self, tensors: Sequence[Tensor], group_size: int) -> int:
        return KernelWeights.of_tensors(tensors, (), group_size).rotation.channels

    def compute(
        self,
        x: Tensor,
        tensors: Sequence[Tensor],
        bias: Tensor | None,
        sizes: Sequence[int],
        group_size: int,
        activations: str | None = None,
    ) -> Tensor:
        from ..kernels.run.launch import linear

        choice: table.Choice = table.DENSE
        # The kernels multiply in 16 bits. For float32 the weight is decoded, so that no precision is lost.
        if x.dtype != torch.float32:
            choice = table.choose(device_class(x.device), sum(sizes), x.shape[1], x.shape[0])
        return linear(x, KernelWeights.of_tensors(tensors, sizes, group_size), bias, choice)

    def input_gradient(self, grad: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int], group_size: int) -> Tensor:
        from ..kernels.run.launch import decode

        return grad @ decode(KernelWeights.of_tensors(tensors, sizes, group_size), grad.dtype)

    def stored(
        self, tensors: Sequence[Tensor], sizes: Sequence[int], index: int, layout: LinearLayout
    ) -> dict[str, Tensor]:
        return KernelWeights.of_tensors(tensors, sizes, layout.group_size).stored(index, layout)
