"""Run a block's experts from their codes on NVIDIA GPUs.

An assignment is a token with one of its experts: those of token t are t · k … t · k + k - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.run.expert_weights import ExpertWeights
from ..spec.fields import short
from ..spec.linear import LinearLayout, PackedLinear
from .experts_base import Experts
from .operators import fake, operator
from .triton_kernels import TritonKernels


@dataclass(frozen=True)
class TritonExperts(Experts):
    """A block's experts as our Triton kernels read them. They rotate the input once for all experts."""

    up: ExpertWeights
    down: ExpertWeights

    name = TritonKernels.name
    replaces = TritonKernels.replaces

    @classmethod
    def refusal(
        cls, layout: LinearLayout, device: torch.device, dtype: torch.dtype, per_expert: bool = False
    ) -> str | None:
        if dtype not in (torch.float16, torch.bfloat16):
            return f"multiplies experts in 16 bits, the activations are {short(dtype)}"
        if (reason := TritonKernels().refusal(layout, device, dtype)) is not None:
            return reason
        return "rotates once for all experts, and each of these has a transform of its own" if per_expert else None

    @classmethod
    def build(cls, up: Sequence[Sequence[PackedLinear]], down: Sequence[Sequence[PackedLinear]]) -> TritonExperts:
        from ..kernels.run.launch import with_matrix

        made = (ExpertWeights.build(experts) for experts in (up, down))
        return cls(*(replace(weights, each=with_matrix(weights.each)) for weights in made))

    def run(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        activation: str,
        between: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        # torch.compile must not look inside. Otherwise the operators would only take time: 0.1 ms for a block.
        assign, linear, combine = OPERATORS if torch.compiler.is_compiling() else FUNCTIONS
        ids, up, down = ids.contiguous(), self.up, self.down
        given = assign(ids, up.count)
        sizes = list(up.each.out_features)
        joined = linear(x, ids, given, up.tensors(), sizes, up.layout.group_size, up.activations, "")
        if between is not None:
            joined = between(joined)
        sizes = list(down.each.out_features)
        y = linear(joined, ids, given, down.tensors(), sizes, down.layout.group_size, down.activations, activation)
        return combine(y, ids, weights, up.count)

    def warm_up(self, activation: str, dtype: torch.dtype) -> None:
        from ..kernels.run.launch_experts import token_counts

        device, count = self.up.each.words.device, self.up.count
        width = self.down.each.rotation.channels
        between = None if activation else lambda joined: joined[:, :width].contiguous()
        for tokens in token_counts(count):
            x = torch.zeros(tokens, self.up.each.rotation.channels, dtype=dtype, device=device)
            ids = torch.arange(tokens, device=device, dtype=torch.int32)[:, None] % count
            self.run(x, ids, torch.ones(tokens, 1, device=device), activation, between)


def _assign(ids: Tensor, experts: int) -> list[Tensor]:
    """Sort assignments by expert into tiles: owners and members, as `launch_experts.Assignments` has them. ids: [T, k]."""
    from ..kernels.run import launch_experts

    made = launch_experts.assign(ids, experts, launch_experts.choose(ids.numel(), experts))
    if made.tiles.tokens == 1:
        return [made.owners.clone(), ids.new_empty(0)]  # an operator must not return what it was given
    return [made.owners, made.members]


def _linear(
    x: Tensor,
    ids: Tensor,
    given: list[Tensor],
    tensors: list[Tensor],
    sizes: list[int],
    group_size: int,
    activations: str,
    activation: str,
) -> Tensor:
    """Rotate x and multiply each assignment by its expert: [A, sum of sizes]; undefined where the id stands for no expert.

    x: 16-bit [T, C], or [A, C], or with one of `ACTIVATIONS` [A, 2 C]: gate and up; ids: [T, k]; given: what `_assign`
    returned; tensors: of `ExpertWeights.tensors`; sizes: out_features of an expert's linears; activations: the format that x is
    rounded to, "" for none.
    """
    from ..kernels.run import launch_experts

    weights = ExpertWeights.of_tensors(tensors, sizes, group_size, activations)
    tiles = launch_experts.choose(ids.numel(), weights.count)
    owners, members = given
    made = launch_experts.Assignments(ids.reshape(-1), owners, members, tiles)
    return launch_experts.product(x.contiguous(), weights, made, ids.numel() // x.shape[0], activation)


def _combine(y: Tensor, ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Sum the outputs of each token's experts, weighted: y [A, N] → [T, N]; ids, weights: [T, k]."""
    from ..kernels.run import launch_experts

    return launch_experts.combine(y, weights.contiguous(), ids, experts)


assign_experts = operator("assign_experts")(_assign)
experts_linear = operator("experts_linear")(_linear)
combine_experts = operator("combine_experts")(_combine)
FUNCTIONS = (_assign, _linear, _combine)
OPERATORS = (assign_experts, experts_linear, combine_experts)


@fake("assign_experts")
def _(ids, experts):
    from ..kernels.run import launch_experts

    tiles = launch_experts.choose(ids.numel(), experts)
    if tiles.tokens == 1:
        return [ids.new_empty(ids.numel()), ids.new_empty(0)]
    most = launch_experts.most_tiles(ids.numel(), experts, tiles)
    return [ids.new_empty(n, dtype=torch.int32) for n in (most, most * tiles.tokens)]


@fake("experts_linear")
def _(x, ids, given, tensors, sizes, group_size, activations, activation):
    return x.new_empty(ids.numel(), sum(sizes))


@fake("combine_experts")
def _(y, ids, weights, experts):
    return y.new_empty(ids.shape[0], y.shape[1])
