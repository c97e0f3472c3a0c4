"""The whole story of one linear layer on one page.

encode:   W → (W · diag(a)) R → codes on a grid, minimising tr(E H Eᵀ) → packed words
decode:   packed words → (q - z) · s → undo R → undo diag(a) → Ŵ
forward:  x → (x · diag(1/a)) R → times the rotated weight's transpose     (equal to x Ŵᵀ)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..spec.linear import LinearLayout, PackedLinear
from ..spec.recipe import Recipe
from ..support.errors import ConfigError
from . import rounding
from .grid import dequantize
from .packing import pack, unpack
from .rotation import rotate, rotate_dense, rotation_matrix
from .rounding import SOLVERS, Solvers, stored


@dataclass(frozen=True)
class Transform:
    """Channel scale and K rotations of one linear's input, with the values that fp16 storage keeps.

    theta: float32 [K, C/2]; pairs: int16 [K, C]; inverse_scales: float32 [C], the 1/a that multiplies activations
    (stored as `channel_scales`); matrix: the dense R, [G, g, g].
    """

    theta: Tensor
    pairs: Tensor
    inverse_scales: Tensor
    matrix: Tensor

    @classmethod
    def build(cls, theta: Tensor, pairs: Tensor, inverse_scales: Tensor, group_size: int) -> Transform:
        """Make a transform from fitted or stored values, which are rounded to fp16 first."""
        theta = stored(theta.detach().float())
        matrix = rotation_matrix(theta, pairs, group_size)
        return cls(theta, pairs, stored(inverse_scales.detach().float()).flatten(), matrix)

    @classmethod
    def identity(cls, channels: int, group_size: int, rotations: int = 0, device=None) -> Transform:
        """No scaling, all angles zero."""
        pairs = torch.arange(group_size, dtype=torch.int16, device=device).repeat(rotations, channels // group_size)
        theta = torch.zeros(rotations, channels // 2, device=device, dtype=torch.float32)
        scales = torch.ones(channels, device=device, dtype=torch.float32)
        return cls.build(theta, pairs.view(rotations, channels), scales, group_size)

    def times(self, factor: float) -> Transform:
        """Return the transform of `factor` times the weight: the factor, a power of two, goes into the channel scales.

        Raises `ConfigError` where fp16 cannot hold them.
        """
        if factor == 1:
            return self
        inverse = stored(self.inverse_scales * factor)
        if not inverse.isfinite().all() or not (inverse != 0).all():
            raise ConfigError(
                f"channel scales of {(self.inverse_scales * factor).abs().aminmax()} do not fit fp16: the weight is too "
                "large or too small. Rescale the layer in the source model, or leave it as it is with --ignore."
            )
        return replace(self, inverse_scales=inverse)

    def tensors(self) -> dict[str, Tensor]:
        """Return theta, pairs and channel_scales as they are stored."""
        return {
            "theta": self.theta.half().contiguous(),
            "pairs": self.pairs.to(torch.int16).contiguous(),
            "channel_scales": self.inverse_scales.half()[None],
        }

    def weight_in(self, w: Tensor) -> Tensor:
        """(W · diag(a)) R, for w [N, C]."""
        return rotate_dense(w / self.inverse_scales, self.matrix)

    def weight_out(self, w_rot: Tensor) -> Tensor:
        """Return the inverse of `weight_in`."""
        return rotate_dense(w_rot, self.matrix.mT) * self.inverse_scales

    def hessian_in(self, hessian: Tensor) -> Tensor:
        """Rᵀ diag(1/a) H diag(1/a) R: second moments of the transformed activations, for H [C, C]."""
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

    weight: [N, C]; hessian: XᵀX of its inputs [C, C], needed for GPTQ and for weighing a range search; solvers: the
    inner loops of GPTQ and refinement. Raises `ConfigError` for GPTQ without a Hessian.
    """
    w_rot = transform.weight_in(weight.float())
    h_rot = transform.hessian_in(hessian.float()) if hessian is not None else None
    grid = rounding.search_range(w_rot, h_rot, layout.bits, layout.group_size, layout.spec.symmetric, recipe.shrinks)
    if recipe.rounding == "nearest":
        codes = rounding.nearest(w_rot, grid)
    elif h_rot is None:
        raise ConfigError("rounding is 'gptq', which needs a Hessian; pass one, or choose 'nearest'")
    else:
        codes = rounding.gptq(w_rot, h_rot, grid, recipe.damping, recipe.by_activation, solvers)
        if recipe.sweeps:
            grid, codes = rounding.refine(w_rot, h_rot, grid, codes, recipe.sweeps, recipe.refit_scales, solvers)
    return assemble(layout, transform, codes, grid.scale, grid.zero, bias)


def assemble(
    layout: LinearLayout, transform: Transform, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None
) -> PackedLinear:
    """Return codes uint8 [N, C] on the grid `scale`, `zero` [N, G], in the rotated basis, as they are stored."""
    tensors = {
        "qweight": pack(codes.T.contiguous(), layout.bits),
        "qzeros": pack(zero.T.to(torch.uint8).contiguous(), layout.bits),
        "scales": scale.T.half().contiguous(),
        **transform.tensors(),
    }
    return PackedLinear(layout, tensors if bias is None else {**tensors, "bias": bias.half()})


def transform_of(packed: PackedLinear) -> Transform:
    """Return the stored transform, ready to use."""
    return Transform.build(packed["theta"], packed["pairs"], packed["channel_scales"], packed.layout.group_size)


def rotated_weight(packed: PackedLinear) -> Tensor:
    """ŵ = (q - z) · s in the rotated basis: float32 [N, C]."""
    bits = packed.layout.bits
    codes, zeros = unpack(packed["qweight"], bits).T.contiguous(), unpack(packed["qzeros"], bits).T.float()
    return dequantize(codes, packed["scales"].T.float(), zeros)


def decode(packed: PackedLinear) -> Tensor:
    """Return the dense weight that the packed linear stands for, in the original basis: float32 [N, C]."""
    return transform_of(packed).weight_out(rotated_weight(packed))


def forward(packed: PackedLinear, x: Tensor) -> Tensor:
    """Return the reference for every kernel: x [..., C] → [..., N], in float32, rotating the activations step by step."""
    scaled = x.float() * packed["channel_scales"].float()
    x_rot = rotate(scaled, packed["theta"].float(), packed["pairs"], packed.layout.group_size)
    y = x_rot @ rotated_weight(packed).T
    return y + packed.bias.float() if packed.bias is not None else y
