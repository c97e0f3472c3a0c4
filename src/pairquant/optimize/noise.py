"""What rounding the activations of a layer costs: the part of a transform's loss beside tr(E H Eᵀ), and what rounding does
to second moments.

With x_rot = (x · diag(1/a)) R, ε = round(x_rot) - x_rot and the layer's rotated weight W_rot, rounding changes the layer's
output by ε W_rotᵀ. Errors of different groups are taken as independent, so that the expected square of that is

    sum over groups of tr(W_g D_g W_gᵀ),   D_g = εᵀ ε over the text,

with ε of a sample of tokens. W_gᵀ W_g follows from the Gram matrix of the weight's own columns, so that a step costs little
beside the product E H.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.activations import noise
from ..core.rounding import damped_cholesky
from ..spec.linear import LinearLayout, Spec
from .moments import second_moment
from .ranks import ALONE, Ranks

#: About how many tokens of the text the errors of activations are evaluated on, for each input.
SAMPLED_TOKENS = 1024
#: Share of the mean diagonal added to the moments of rounded inputs before solving for the weight that fits them.
DAMPING = 1e-2
#: Format → the fewest tokens of text, for each input channel, on which weights are fitted to rounded inputs: with fewer they
#: are worse on other text. For int8 and fp8 they are no better even with 52 (docs/decisions.md).
CORRECTED = {"int4": 32, "mxfp4": 16}


def tokens_to_correct(layout: LinearLayout) -> int | None:
    """Return the fewest tokens of text on which a linear's weight is fitted to its rounded inputs; None for never."""
    each = CORRECTED.get(layout.activations or "")
    return None if each is None else each * layout.in_features


def is_corrected(layout: LinearLayout, tokens: int) -> bool:
    """Return whether a linear's weight is fitted to its rounded inputs; tokens: of the text that the linear reads."""
    needed = tokens_to_correct(layout)
    return needed is not None and tokens >= needed


@dataclass
class InputNoise:
    """The errors of one layer's rounded activations. sample: float32 [T, C] of its inputs, this rank's part; may be empty.

    share: tokens of the text for each token of all ranks' samples; gram: W_gᵀ W_g of the weight in the model's basis,
    [G, g, g], over the rows of all ranks.
    """

    sample: Tensor
    share: float
    spec: Spec
    gram: Tensor

    @classmethod
    def of(cls, weight: Tensor, sample: Tensor, tokens: int, spec: Spec, ranks: Ranks = ALONE) -> InputNoise:
        """weight: [N, C], this rank's rows; sample: of its text; tokens: of the whole text that all samples were drawn from.

        All ranks call this, also those whose sample is empty: a router may give an expert no token there.
        """
        by_group = weight.unflatten(1, (-1, spec.group_size)).transpose(0, 1)
        gram, sampled = by_group.mT @ by_group, torch.tensor([len(sample)], device=weight.device)
        ranks.add(gram)
        ranks.add(sampled)
        return cls(sample, tokens / max(1, int(sampled)), spec, gram)

    def loss_and_gradients(
        self, into: Tensor, out_of: Tensor, slopes: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the expected squared change of the output, and its gradients with respect to the matrices [G, g, g].

        This rank's part of them, from its own sample: the sum over all ranks is the whole.
        into: diag(a) R, of the weight; out_of: Rᵀ diag(1/a).
        """
        activations, g = self.spec.activations, self.spec.group_size
        assert activations is not None, "made only for layers whose activations are rounded"
        with torch.enable_grad():
            forth, back = into.detach().requires_grad_(slopes), out_of.detach().requires_grad_(slopes)
            by_group = self.sample.unflatten(1, (-1, g)).transpose(0, 1)
            x_rot = (by_group @ back.mT).transpose(0, 1).flatten(1)  # [T, C]
            error = noise(x_rot, activations, g).unflatten(1, (-1, g)).transpose(0, 1)
            loss = self.share * ((error.mT @ error) * (forth.mT @ self.gram @ forth)).sum()
            if not slopes:
                return loss.detach(), None, None
            grad_into, grad_out_of = torch.autograd.grad(loss, (forth, back))
            return loss.detach(), grad_into, grad_out_of


@dataclass
class RoundedMoments:
    """Sums over the text of what one linear reads, X, and what it multiplies instead, Q: both in the model's basis.

    hessian: QᵀQ; cross: XᵀQ; float32 [C, C].
    """

    hessian: Tensor
    cross: Tensor

    def target(self, weight: Tensor) -> Tensor:
        """Return the weight [N, C] whose output on Q is nearest to that of `weight` on X: W (XᵀQ) (QᵀQ + damping)⁻¹."""
        factor = damped_cholesky(self.hessian, DAMPING)
        difference = (self.cross - self.hessian).double()
        return weight + torch.cholesky_solve((weight.double() @ difference).T, factor).T.to(weight.dtype)


@dataclass
class RoundedSum:
    """Adds up `RoundedMoments` by path. `rounded_inputs` calls `add` for each input."""

    total: dict[str, RoundedMoments] = field(default_factory=dict)

    def add(self, path: str, x: Tensor, rounded: Tensor) -> None:
        """Add what one linear reads and what it multiplies instead: [..., C] each."""
        x, rounded = x.detach().flatten(0, -2), rounded.detach().flatten(0, -2)
        found = RoundedMoments(second_moment(rounded, rounded), second_moment(x, rounded))
        self.include(path, found)

    def include(self, path: str, found: RoundedMoments) -> None:
        """Add what was summed up elsewhere."""
        if (total := self.total.get(path)) is None:
            self.total[path] = found
        else:
            total.hessian += found.hessian
            total.cross += found.cross
