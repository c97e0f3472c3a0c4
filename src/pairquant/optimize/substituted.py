"""A block that computes with other weights than its own, as training needs it: the block itself is never touched."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..models.blocks import Block
from ..models.calls import Call
from ..models.rounded_inputs import is_matrix, rounded_inputs, roundings_from
from ..spec.linear import LinearLayout

Weights = dict[str, Tensor]


class Substituted(nn.Module):
    """Runs a block with weights that are given by their full paths; it keeps those that are not given.

    In bfloat16 within the block only, on GPUs and for blocks of that dtype: what is trained is float32.
    """

    def __init__(
        self,
        block: Block,
        call: Call,
        layouts: Mapping[str, LinearLayout],
        replaced: Collection[str] | None = None,
    ):
        """layouts: of the block's linears, by path, whose activations may be rounded; replaced: full names of the parameters that
        will always be given. With them, the block may lose all of its weights: what else it computes with is held here.
        """
        super().__init__()
        self.block, self.path, self.call = block.module, block.path, call
        self.sites, self.layouts = block.sites, layouts
        first = next(block.module.parameters())
        self.device = first.device
        self.low_precision = first.is_cuda or first.dtype == torch.bfloat16
        self.held = {} if replaced is None else self._rest(replaced)
        self.held |= self._norms_in_float32() if self.device.type == "cpu" else {}

    def forward(self, inputs: Tensor, windows: Tensor | None = None) -> Tensor:
        """inputs: [B, T, H] → [B, T, H]."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low_precision):
            return self.call.run(self.block, inputs.to(self.device, torch.float32), windows)

    def of(self, weights: Mapping[str, Tensor], inputs: Tensor, windows: Tensor | None = None) -> Tensor:
        """Run the block with these weights. inputs: [B, T, H]; windows: their numbers in the text, int64 [B].

        The matrices of `matrices_of` among the weights say how its linears round what they read.
        """
        named = {
            f"block{name.removeprefix(self.path)}": self._operand(weight)
            for name, weight in weights.items()
            if not is_matrix(name)
        }
        with rounded_inputs(self.sites, roundings_from(self.sites, self.layouts, weights)):
            return functional_call(self, self.held | named, (inputs, windows))

    def _rest(self, replaced: Collection[str]) -> Weights:
        """Return the block's parameters and buffers except those that are replaced."""
        tensors = [*self.block.named_parameters(), *self.block.named_buffers()]
        return {f"block.{name}": t.detach() for name, t in tensors if f"{self.path}.{name}" not in replaced}

    def _norms_in_float32(self) -> Weights:
        """Return copies of the parameters of LayerNorms: on CPUs they take float32 inputs, which autocast leaves, only with these."""
        return {
            f"block.{path}.{name}": parameter.float()
            for path, module in self.block.named_modules()
            if isinstance(module, nn.LayerNorm)
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dtype != torch.float32
        }

    def _operand(self, weight: Tensor) -> Tensor:
        """Return a weight as the block takes it: those of experts, [E, …], in bfloat16 where the others are turned into it.

        Autocast leaves grouped products as they are. Transformers turns their other operand into the dtype of the weights.
        """
        return weight.to(torch.bfloat16) if self.low_precision and weight.dim() == 3 else weight
