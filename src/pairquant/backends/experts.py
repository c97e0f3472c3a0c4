"""Run a block's experts from their codes on NVIDIA GPUs, by operators that torch.compile does not look inside.

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
from .triton_int4 import TritonInt4

#: Activations between gate and up that are computed together with the rotation after them; "" is none.
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def experts_refusal(layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why there is no kernel for experts of this layout; None if there is. dtype: of the activations."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"multiplies experts in 16 bits, the activations are {short(dtype)}"
    return TritonInt4().refusal(layout, device, dtype)


def prepare_experts(experts: Sequence[Sequence[PackedLinear]], dtype: torch.dtype) -> list[Tensor]:
    """Return the tensors that `experts_linear` needs. experts: the linears of each that read the same input, one transform."""
    return build_experts(experts, dtype).tensors()


def build_experts(experts: Sequence[Sequence[PackedLinear]], dtype: torch.dtype) -> ExpertWeights:
    """Return the weights that `Experts` holds; experts: as of `prepare_experts`."""
    from ..kernels.run.launch import with_matrix

    weights = ExpertWeights.build(experts, dtype)
    return replace(weights, each=with_matrix(weights.each))


@dataclass(frozen=True)
class Experts:
    """A block's experts, ready to run: up is what all of them have for the block's input, down what is for the activations."""

    up: ExpertWeights
    down: ExpertWeights

    def run(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        activation: str,
        between: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Run the experts without operators, for callers that torch.compile does not look into: x [T, H] → [T, H].

        ids, weights: [T, k]; activation: one of `ACTIVATIONS`, or "" if `between` makes [A, I] of what `up` gives.
        """
        from ..kernels.run import launch_experts

        ids = ids.contiguous()
        given = launch_experts.assign(ids, self.up.count, launch_experts.choose(ids.numel(), self.up.count))
        joined = launch_experts.product(x.contiguous(), self.up, given, ids.shape[1])
        if between is not None:
            joined = between(joined)
        y = launch_experts.product(joined, self.down, given, 1, activation)
        return launch_experts.combine(y, weights.contiguous(), ids, self.up.count)

    def warm_up(self, activation: str, dtype: torch.dtype) -> None:
        """Compile every kernel that some number of tokens needs, so that no request has to wait for it."""
        from ..kernels.run.launch_experts import token_counts

        device, channels, count = self.up.each.words.device, self.up.each.rotation.channels, self.up.count
        for tokens in token_counts(count):
            x = torch.zeros(tokens, channels, dtype=dtype, device=device)
            ids = torch.arange(tokens, device=device, dtype=torch.int32)[:, None] % count
            between = None if activation else lambda joined: joined[:, : self.down.each.rotation.channels].contiguous()
            self.run(x, ids, torch.ones(tokens, 1, device=device), activation, between)


def stored_codes(
    tensors: Sequence[Tensor], sizes: Sequence[int], expert: int, index: int, layout: LinearLayout
) -> dict[str, Tensor]:
    """Return qweight, qzeros and scales of one linear of an expert, bit for bit as they were loaded."""
    return ExpertWeights.of_tensors(tensors, sizes, layout.group_size).stored(expert, index, layout)


@torch.library.custom_op("pairquant::assign_experts", mutates_args=())
def assign_experts(ids: Tensor, experts: int) -> list[Tensor]:
    """Sort assignments by expert into tiles for `experts_linear`: owners and members, as `launch_experts.Assignments` has them.

    ids: integers [T, k]; those that are negative or not below the number of experts stand for none.
    """
    from ..kernels.run import launch_experts

    made = launch_experts.assign(ids, experts, launch_experts.choose(ids.numel(), experts))
    # Operators must not return what they were given.
    return [made.owners.clone(), ids.new_empty(0)] if made.tiles.tokens == 1 else [made.owners, made.members]


@assign_experts.register_fake
def _(ids, experts):
    from ..kernels.run import launch_experts

    tiles = launch_experts.choose(ids.numel(), experts)
    if tiles.tokens == 1:
        return [ids.new_empty(ids.numel()), ids.new_empty(0)]
    most = launch_experts.most_tiles(ids.numel(), experts, tiles)
    return [ids.new_empty(n, dtype=torch.int32) for n in (most, most * tiles.tokens)]


@torch.library.custom_op("pairquant::experts_linear", mutates_args=())
def experts_linear(
    x: Tensor,
    ids: Tensor,
    given: list[Tensor],
    tensors: list[Tensor],
    sizes: list[int],
    group_size: int,
    activation: str,
) -> Tensor:
    """Rotate x and multiply each assignment by its expert: [A, sum of sizes]; undefined where the id stands for no expert.

    x: 16-bit [T, C], or [A, C], or with one of `ACTIVATIONS` [A, 2 C]: gate and up; ids: [T, k]; given: of `assign_experts`;
    tensors: of `prepare_experts`; sizes: out_features of an expert's linears.
    """
    from ..kernels.run import launch_experts

    weights = ExpertWeights.of_tensors(tensors, sizes, group_size)
    made = _assignments(ids, given, weights.count)
    return launch_experts.product(x.contiguous(), weights, made, ids.numel() // x.shape[0], activation)


@experts_linear.register_fake
def _(x, ids, given, tensors, sizes, group_size, activation):
    return x.new_empty(ids.numel(), sum(sizes))


@torch.library.custom_op("pairquant::combine_experts", mutates_args=())
def combine_experts(y: Tensor, ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Sum the outputs of each token's experts, weighted: y [A, N] → [T, N]; ids, weights: [T, k]."""
    from ..kernels.run import launch_experts

    return launch_experts.combine(y, weights.contiguous(), ids.contiguous(), experts)


@combine_experts.register_fake
def _(y, ids, weights, experts):
    return y.new_empty(ids.shape[0], y.shape[1])


def _assignments(ids: Tensor, given: list[Tensor], experts: int):
    from ..kernels.run import launch_experts

    tiles = launch_experts.choose(ids.numel(), experts)
    return launch_experts.Assignments(ids.reshape(-1), given[0], given[1], tiles)
