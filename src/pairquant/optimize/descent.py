"""AdamW on the tensors of a stage, the rates decaying along a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..spec.recipe import Training


class Descent:
    """The optimizer of some tensors, float32 leaves with their learning rates, for a known number of steps."""

    def __init__(self, trained: Sequence[tuple[Tensor, float]], how: Training, steps: int):
        self.tensors = [tensor.requires_grad_() for tensor, _ in trained]
        by_rate: dict[float, list[Tensor]] = {}
        for tensor, rate in trained:  # a block of 128 experts has 400 weights: few groups take few launches
            by_rate.setdefault(rate, []).append(tensor)
        self._optimizer = torch.optim.AdamW(
            [{"params": alike, "lr": rate} for rate, alike in by_rate.items()],
            betas=(how.beta1, how.beta2),
            eps=how.eps,
            weight_decay=how.weight_decay,
            fused=True,
        )
        self._decay = torch.optim.lr_scheduler.LambdaLR(self._optimizer, cosine(how.final_rate, steps))

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients that have gathered."""
        return [tensor.grad for tensor in self.tensors if tensor.grad is not None]

    def step(self) -> None:
        """Go one step along the gradients, and forget them."""
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._decay.step()

    def values(self) -> list[Tensor]:
        """Return copies of the tensors as they are."""
        return [tensor.detach().clone() for tensor in self.tensors]

    def end(self, values: Sequence[Tensor]) -> None:
        """Train no more, and give the tensors these values."""
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.requires_grad_(False).copy_(value)


def cosine(final: float, steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate before each step: from 1 to `final` along half a cosine."""
    return lambda step: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / steps))


def leaves_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights cut off from what they were computed from; gradients gather on them over micro-batches."""
    return {name: weight.detach().requires_grad_() for name, weight in weights.items()}


def pass_on(weights: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> None:
    """Hand the gradients that have gathered on the leaves back to what the weights were computed from."""
    used = [name for name, leaf in leaves.items() if leaf.grad is not None and weights[name].requires_grad]
    torch.autograd.backward([weights[name] for name in used], [leaves[name].grad for name in used])
