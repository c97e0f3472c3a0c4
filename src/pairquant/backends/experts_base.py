"""The interface of what runs a block's experts from their codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec.linear import LinearLayout, PackedLinear

#: Activations of the gate that all `Experts` compute themselves, here by PyTorch; down reads the gate's value times up.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}


class HoldsExperts(Protocol):
    """Linears of every expert that read the same input, in another form than the stored one."""

    @property
    def count(self) -> int:
        """The number of experts."""

    def stored(self, expert: int, index: int, layout: LinearLayout) -> dict[str, Tensor]:
        """Return the stored tensors that this form has taken the place of, of one linear of an expert, bit for bit."""


class Experts(ABC):
    """A block's experts, ready to run.

    up: all their linears that read the block's input; down: those that read the inner activations; name: for users; replaces:
    names of stored tensors that `up` and `down` hold in another form, so that they can be freed.
    """

    up: HoldsExperts
    down: HoldsExperts
    name: str
    replaces: tuple[str, ...]

    @classmethod
    @abstractmethod
    def refusal(
        cls, layout: LinearLayout, device: torch.device, dtype: torch.dtype, per_expert: bool = False
    ) -> str | None:
        """Return the reason, in words, why experts of this layout cannot be run so; None if they can.

        dtype: of the activations; per_expert: whether each expert has a transform of its own.
        """

    @classmethod
    @abstractmethod
    def build(cls, up: Sequence[Sequence[PackedLinear]], down: Sequence[Sequence[PackedLinear]]) -> Experts:
        """Repack the linears of each expert. Unless each has transforms of its own, all of `up` share one, and all of `down`
        another.
        """

    @abstractmethod
    def run(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        activation: str,
        between: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Run the experts: x [T, H] → [T, H], of a dtype that is not refused. x gets no gradient.

        ids: integers [T, k], of which those that are negative or not below the number of experts stand for none; weights:
        [T, k]; activation: one of `ACTIVATIONS`, or "" if `between` makes [A, I] of what `up` gives.
        """

    @abstractmethod
    def warm_up(self, activation: str, dtype: torch.dtype) -> None:
        """Compile every kernel that some number of tokens needs, so that no request has to wait for it."""
