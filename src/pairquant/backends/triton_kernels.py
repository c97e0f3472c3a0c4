"""The backend for NVIDIA GPUs: Triton kernels that run up to three linears of one input in one launch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.availability import device_class, has_float8, triton_missing
from ..kernels.run import row_scales, table
from ..kernels.run.decoded_budget import budget
from ..kernels.run.norm import Norm
from ..kernels.run.weights import MAX_SEGMENTS, KernelWeights
from ..spec.linear import LinearLayout, PackedLinear
from .base import Backend


class TritonKernels(Backend):
    """Triton kernels that rotate, multiply and, for many tokens, decode; their tiles come from a measured table.

    Where the user gave memory for it, decoded weights are kept, and multiply many tokens by themselves.
    """

    name = "triton"
    replaces = ("qweight", "qzeros", "scales")
    most = MAX_SEGMENTS

    def refusal(self, layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return f"runs on NVIDIA GPUs, not on {device.type}"
        activations = layout.activations
        if activations is not None and dtype == torch.float32 and not _eight_bits(layout, device):
            return f"multiplies {activations} activations and {layout.bits}-bit weights in 16 bits, not in float32"
        if layout.activations == "fp8" and not has_float8(device):
            return "rounds to fp8 on NVIDIA GPUs of compute capability 8.9 or newer"
        return triton_missing()

    def simulates(self, layout: LinearLayout, device: torch.device) -> bool:
        return layout.activations is not None and not _eight_bits(layout, device)

    def prepare(self, linears: Sequence[PackedLinear], dtype: torch.dtype) -> list[Tensor]:
        from ..kernels.run.launch import with_matrix

        weights, layout = with_matrix(KernelWeights.build(linears)), linears[0].layout
        if layout.activations is not None and _eight_bits(layout, weights.words.device):
            from ..kernels.run.launch_rounded import with_row_scales  # needs a newer Triton than the other kernels

            if all(row_scales.suffice(linear, layout.activations) for linear in linears):
                weights = with_row_scales(weights, layout.activations)
            elif not torch.compiler.is_compiling():
                warnings.warn(f"{self.name}: {row_scales.WARNING}", stacklevel=2)
        return _with_decoded(weights, layout, dtype).tensors()

    def channels(self, tensors: Sequence[Tensor], group_size: int) -> int:
        return KernelWeights.channels(tensors)

    def compute(
        self,
        x: Tensor,
        tensors: Sequence[Tensor],
        bias: Tensor | None,
        sizes: Sequence[int],
        group_size: int,
        activations: str | None = None,
    ) -> Tensor:
        from ..kernels.run import launch

        weights = KernelWeights.of_tensors(tensors, sizes, group_size)
        if activations is None:
            return launch.linear(x, weights, bias, _choice(x, weights))
        from ..kernels.run import launch_rounded

        kind, rows, channels, tokens = device_class(x.device), sum(sizes), x.shape[1], x.shape[0]
        if x.dtype == torch.float32:
            tokens = max(tokens, table.BYTES_FROM)  # those of fewer are of 16 bits
        by_row = weights.row_scales is not None
        chosen = table.choose_rounded(kind, rows, channels, tokens, activations, weights.bits, by_row, weights.floating)
        return launch_rounded.linear(x, weights, bias, chosen, activations)

    def fuses(self, before: str, layout: LinearLayout, dtype: torch.dtype) -> bool:
        allowed = (torch.bfloat16,) if before == "norm" else (torch.float16, torch.bfloat16)
        return layout.activations is None and dtype in allowed

    def compute_after_norm(
        self,
        x: Tensor,
        residual: Tensor,
        norm: Norm,
        tensors: Sequence[Tensor],
        bias: Tensor | None,
        sizes: Sequence[int],
        group_size: int,
    ) -> tuple[Tensor, Tensor]:
        if x.dtype == torch.float32:
            return super().compute_after_norm(x, residual, norm, tensors, bias, sizes, group_size)
        from ..kernels.run import launch_norm

        weights = KernelWeights.of_tensors(tensors, sizes, group_size)
        return launch_norm.norm_linear(x, residual, norm, weights, bias, _choice(x, weights))

    def compute_after_silu(
        self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, sizes: Sequence[int], group_size: int
    ) -> Tensor:
        if x.dtype == torch.float32:
            return super().compute_after_silu(x, tensors, bias, sizes, group_size)
        from ..kernels.run import launch_norm

        weights = KernelWeights.of_tensors(tensors, sizes, group_size)
        return launch_norm.silu_linear(x, weights, bias, _choice(x, weights))

    def input_gradient(self, grad: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int], group_size: int) -> Tensor:
        from ..kernels.run.launch import decode

        weights = KernelWeights.of_tensors(tensors, sizes, group_size)
        if weights.decoded is not None and weights.decoded.dtype == grad.dtype:
            return grad @ weights.decoded
        return grad @ decode(weights, grad.dtype)

    def stored(
        self, tensors: Sequence[Tensor], sizes: Sequence[int], index: int, layout: LinearLayout
    ) -> dict[str, Tensor]:
        return KernelWeights.of_tensors(tensors, sizes, layout.group_size).stored(index, layout)


def _with_decoded(weights: KernelWeights, layout: LinearLayout, dtype: torch.dtype) -> KernelWeights:
    """Decode the weights, to be kept, if they multiply 16-bit activations and the user's memory for it is not used up.

    Not while torch.compile traces, which would count them in a graph's place.
    """
    if dtype.itemsize != 2 or layout.activations is not None or torch.compiler.is_compiling():
        return weights
    from ..kernels.run.launch import decode

    nbytes = sum(weights.out_features) * weights.rotation.channels * dtype.itemsize
    if not (limit := budget("cuda")).take(nbytes):
        return weights
    try:
        decoded = decode(weights, dtype)
    except BaseException:
        limit.give_back(nbytes)
        raise
    limit.give_back_with(decoded)
    return replace(weights, decoded=decoded)


def _choice(x: Tensor, weights: KernelWeights) -> table.Product:
    """Return what multiplies x, whose activations are not rounded.

    The kernels multiply in 16 bits. For float32 the weight is decoded, so that no precision is lost.
    """
    if x.dtype == torch.float32:
        return table.DENSE
    tokens, decoded = x.shape[0], weights.decoded
    if decoded is not None and decoded.dtype == x.dtype and tokens >= table.DECODED_FROM:
        return table.Kept()
    return table.choose(device_class(x.device), sum(weights.out_features), weights.rotation.channels, tokens)


def _eight_bits(layout: LinearLayout, device: torch.device) -> bool:
    """Tell whether products are of 8 bits; of a GPU that is not there, as on an H100."""
    there = device.type != "cuda" or torch.cuda.is_available()
    kind = device_class(device) if there else "sm90"
    return table.eight_bits(kind, layout.activations or "", layout.bits, layout.weights is not None)
