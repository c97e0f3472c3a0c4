"""All steps of quantizing and running one linear layer, on one page.

encode:   W → (W · diag(a)) R → codes on a grid, minimising tr(E H Eᵀ) → packed words
decode:   packed words → steps of the grid · s → undo R → undo diag(a) → Ŵ
forward:  x → (x · diag(1/a)) R → times the rotated weight's transpose     (equal to x Ŵᵀ)
          With an activation format, what is multiplied is first rounded to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..spec.linear import LinearLayout, PackedLinear
from ..spec.recipe import Recipe
from ..support.errors import ConfigError
from . import rounding
from .activations import rounded
from .grids import Grid, grid_of, stored
from .packing import pack, unpack
from .rotation import rotate, rotate_dense, rotation_matrix
from .rounding import SOLVERS, Solvers


@dataclass(frozen=True)
class Transform:
    """Channel scales and K rotations of one linear's input, already rounded to the values that are stored in fp16.

    theta: float32 [K, C/2]; pairs: int16 [K, C]; inverse_scales: float32 [C], the 1/a that multiplies activations
    (stored as `channel_scales`); matrix: the dense R, [G, g, g].
    """

    theta: Tensor
    pairs: Tensor
    inverse_scales: Tensor
    matrix: Tensor

    @classmethod
    def build(cls, theta: Tensor, pairs: Tensor, inverse_scales: Tensor, group_size: int) -> Transform:
        """Make a transform from fitted or stored values, which are first rounded to fp16."""
        theta = stored(theta.detach().float())
        matrix = rotation_matrix(theta, pairs, group_size)
        return cls(theta, pairs, stored(inverse_scales.detach().float()).flatten(), matrix)

    @classmethod
    def identity(cls, channels: int, group_size: int, rotations: int = 0, device=None) -> Transform:
        """Return the transform that changes nothing: all scales are 1 and all angles 0."""
        pairs = torch.arange(group_size, dtype=torch.int16, device=device).repeat(rotations, channels // group_size)
        theta = torch.zeros(rotations, channels // 2, device=device, dtype=torch.float32)
        scales = torch.ones(channels, device=device, dtype=torch.float32)
        return cls.build(theta, pairs.view(rotations, channels), scales, group_size)

    def times(self, factor: float) -> Transform:
        """Return the transform with its inverse scales multiplied by `factor`, a power of two.

        If this transform was fitted to the weight divided by `factor`, the result is the transform for the weight itself.
        Raises `ConfigError` if fp16 cannot hold the new channel scales.
        """
        if factor == 1:
            return self
        inverse = stored(self.inverse_scales * factor)
        if not inverse.isfinite().all() or not (inverse != 0).all():
            low, high = (self.inverse_scales * factor).abs().aminmax()
            raise ConfigError(
                f"channel scales from {low:.3g} to {high:.3g} do not fit fp16: the weight is too large or too small. "
                "Rescale the layer in the source model, or leave it as it is with --ignore."
            )
        return replace(self, inverse_scales=inverse)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are stored: theta float16, pairs int16, channel_scales float16 [1, C]."""
        return {
            "theta": self.theta.half().contiguous(),
            "pairs": self.pairs.to(torch.int16).contiguous(),
            "channel_scales": self.inverse_scales.half()[None],
        }

    def weight_in(self, w: Tensor) -> Tensor:
        """Transform a weight [N, C]: (W · diag(a)) R."""
        return rotate_dense(w / self.inverse_scales, self.matrix)

    def weight_out(self, w_rot: Tensor) -> Tensor:
        """Undo `weight_in`: turn a transformed weight [N, C] back into the original basis."""
        return rotate_dense(w_rot, self.matrix.mT) * self.inverse_scales

    def hessian_in(self, hessian: Tensor) -> Tensor:
        """Transform H [C, C] into the second moments of the transformed activations: Rᵀ diag(1/a) H diag(1/a) R."""
        half = rotate_dense(hessian * self.inverse_scales, self.matrix)
        return rotate_dense(half.T * self.inverse_scales, self.matrix)


def encode(
    weight: Tensor,
    transform: Transform,
    hessian: Tensor | None,
    layout: LinearLayout,
    recipe: Recipe,
    bias: Tensor | None = None,
    solvers: Solvers = SOLVERS,
) -> PackedLinear:
    """Transform, round and pack one linear.

    weight: floating [N, C]; hessian: XᵀX of its inputs [C, C], which GPTQ needs, and by which the range search weighs
    errors if it is given; bias: [N]; solvers: the inner loops of GPTQ and refinement. Raises `ConfigError` for GPTQ
    without a Hessian, and `CalibrationError` for a Hessian that cannot be factored.
    """
    w_rot = transform.weight_in(weight.float())
    h_rot = transform.hessian_in(hessian.float()) if hessian is not None else None
    grid = rounding.search_grid(w_rot, h_rot, layout.spec, recipe.shrinks)
    if recipe.rounding == "nearest":
        codes = rounding.nearest(w_rot, grid)
    elif h_rot is None:
        raise ConfigError("rounding is 'gptq', which needs a Hessian; pass one, or choose 'nearest'")
    else:
        codes = rounding.gptq(w_rot, h_rot, grid, recipe.damping, recipe.by_activation, solvers)
        if recipe.sweeps:
            grid, codes = rounding.refine(w_rot, h_rot, grid, codes, recipe.sweeps, recipe.refit_scales, solvers)
    return assemble(layout, transform, codes, grid, bias)


def assemble(
    layout: LinearLayout, transform: Transform, codes: Tensor, grid: Grid, bias: Tensor | None
) -> PackedLinear:
    """Pack the codes, grid, transform and bias into the tensors that are stored.

    codes: uint8 [N, C], in the rotated basis; bias: [N] or None.
    """
    tensors = {"qweight": pack(codes.T.contiguous(), layout.bits), **grid.tensors(), **transform.tensors()}
    return PackedLinear(layout, tensors if bias is None else {**tensors, "bias": bias.half()})


def transform_of(packed: PackedLinear) -> Transform:
    """Return the transform that a packed linear stores."""
    return Transform.build(packed["theta"], packed["pairs"], packed["channel_scales"], packed.layout.group_size)


def rotated_weight(packed: PackedLinear) -> Tensor:
    """Compute the weight in the rotated basis, (q - z) · s or E2M1(q) · s: float32 [N, C]."""
    return grid_of(packed).values(unpack(packed["qweight"], packed.layout.bits).T.contiguous())


def decode(packed: PackedLinear) -> Tensor:
    """Compute the dense weight that the packed linear stands for, in the original basis: float32 [N, C]."""
    return transform_of(packed).weight_out(rotated_weight(packed))


def forward(packed: PackedLinear, x: Tensor) -> Tensor:
    """Run the layer in float32, one rotation after the other: x [..., C] → [..., N]. Every kernel is tested against this."""
    scaled = x.float() * packed["channel_scales"].float()
    x_rot = rotate(scaled, packed["theta"].float(), packed["pairs"], packed.layout.group_size)
    if packed.layout.activations is not None:
        x_rot = rounded(x_rot, packed.layout.activations, packed.layout.group_size)
    y = x_rot @ rotated_weight(packed).T
    return y + packed.bias.float() if packed.bias is not None else y
