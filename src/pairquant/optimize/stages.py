"""A block's weights as functions of what is trained: one class for each stage of block-wise training.

Each has `trained`, the tensors and their learning rates, `weights()`, what the block computes with as long as they
have these values, differentiable, and once they are final something to build packed linears from. All rounding to
stored values (fp16, codes, whole zero points) happens inside `weights()`, straight-through, so that a loss measured in
training is the loss of the packed block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.grid import MIN_SCALE, fake_quantize, group_range
from ..core.grids import WholeGrid, grid_of, stored
from ..core.linear import Transform, assemble
from ..core.packing import unpack
from ..core.rotation import rotate_dense
from ..kernels.fit.matrices import Matrices
from ..models.blocks import Block
from ..models.planning import ROUTERS
from ..models.rounded_inputs import matrices_of
from ..models.sites import held_by_parameters, is_linear
from ..spec.linear import LinearLayout, PackedLinear, Spec
from ..spec.recipe import Recipe, Refit, Training
from .search import alike_in_rotation, sampled_rows, select_for

#: The linears (full paths) of each transform.
Groups = list[tuple[str, ...]]
#: Of every linear, by path.
Layouts = Mapping[str, LinearLayout]


class Stage(Protocol):
    """trained: float32 leaf tensors with their learning rates."""

    trained: list[tuple[Tensor, float]]

    def weights(self) -> dict[str, Tensor]:
        """Return full parameter path → float32 tensor that stands for it, differentiable in what is trained."""


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return exactly `value`, with x's gradient."""
    return value.detach() + (x - x.detach())


class Transforms:
    """The transforms of groups of linears with one group size and number of rotations, their channels side by side.

    There are ΣC channels in all, so that one product builds every R. theta: float32 [K, ΣC/2]; log_scale: float32 [ΣC],
    the change of log a since `start_inverse`, from zero. pairs: int16 [K, ΣC]; free: bool [K, ΣC/2], False where an
    angle must stay at zero.
    """

    def __init__(self, pairs: list[Tensor], free: list[Tensor], theta: list[Tensor], inverse: list[Tensor], g: int):
        """One entry per group: pairs [K, C], free and theta [K, C/2], inverse channel scales [C]; g: group size."""
        self.group_size, self.sizes = g, [len(scales) for scales in inverse]
        self.pairs, self.free = torch.cat(pairs, dim=1), torch.cat(free, dim=1)
        self.theta, self.start_inverse = torch.cat(theta, dim=1).float(), torch.cat(inverse).float()
        self.log_scale = torch.zeros_like(self.start_inverse)
        self.rotation_matrices = Matrices(self.pairs, g)

    @property
    def rotations(self) -> int:
        return len(self.pairs)

    def values(self) -> tuple[Tensor, Tensor]:
        """Return angles [K, ΣC/2] and inverse scales 1/a [ΣC] as fp16 keeps them."""
        theta, inverse = self.theta * self.free, self.start_inverse * self.log_scale.neg().exp()
        return straight_through(theta, stored(theta)), straight_through(inverse, stored(inverse))

    def matrices(self) -> list[tuple[Tensor, Tensor]]:
        """Return for each group of linears diag(a) R, into the rotated basis, and Rᵀ diag(1/a), out of it: [G, g, g] each."""
        theta, inverse = self.values()
        matrix = self.rotation_matrices(theta)
        inverse = inverse.view(-1, self.group_size)
        counts = [size // self.group_size for size in self.sizes]
        into, out_of = matrix / inverse[:, :, None], matrix.mT * inverse[:, None, :]
        return list(zip(into.split(counts), out_of.split(counts), strict=True))

    def build(self) -> list[Transform]:
        """Return one for each group, with stored values."""
        theta, inverse = self.values()
        parts = theta.split([size // 2 for size in self.sizes], 1), self.pairs.split(self.sizes, 1)
        return [
            Transform.build(t, p, i, self.group_size) for t, p, i in zip(*parts, inverse.split(self.sizes), strict=True)
        ]


class BlockTransforms:
    """The transforms of all groups of a block, in their order; those alike in group size and rotations lie together."""

    def __init__(self, count: int, sets: list[tuple[list[int], Transforms]]):
        """sets: places of the groups, of `count` in all, and the transforms of these groups."""
        self.count, self.sets = count, sets

    @classmethod
    def untrained(
        cls, block: Block, groups: Groups, layouts: Layouts, seeds: Mapping[str, int], starts: list[float], method: str
    ) -> BlockTransforms:
        """Selected pairs, angles zero, inverse channel scales at `starts`, a number for each group.

        seeds: for pair selection, by the first path of each group; method: of `PAIR_SELECTIONS`.
        """

        def of(places: list[int]) -> Transforms:
            pairs, free, inverse = [], [], []
            for i in places:
                weight = sampled_rows([block.sites[path].weight for path in groups[i]]).float()
                selection = select_for(weight / starts[i], seeds[groups[i][0]], layouts[groups[i][0]].spec, method)
                pairs.append(selection.pairs.to(weight.device))
                free.append(selection.free.to(weight.device))
                inverse.append(torch.full((weight.shape[1],), starts[i], device=weight.device))
            theta = [torch.zeros(f.shape, device=f.device) for f in free]
            return Transforms(pairs, free, theta, inverse, layouts[groups[places[0]][0]].group_size)

        alike = alike_in_rotation([layouts[group[0]].spec for group in groups])
        return cls(len(groups), [(places, of(places)) for places in alike])

    @classmethod
    def stored_in(cls, packed: list[PackedLinear]) -> BlockTransforms:
        """Return those of one packed linear of each group. Pairs that only fill up are known by their angle of zero."""

        def of(places: list[int]) -> Transforms:
            some = [packed[i] for i in places]
            theta, inverse = [p["theta"].float() for p in some], [p["channel_scales"].flatten() for p in some]
            pairs = [p["pairs"] for p in some]
            return Transforms(pairs, [t != 0 for t in theta], theta, inverse, some[0].layout.group_size)

        alike = alike_in_rotation([p.layout.spec for p in packed])
        return cls(len(packed), [(places, of(places)) for places in alike])

    def angles(self) -> list[Tensor]:
        """Return the trainable angles."""
        return [transforms.theta for _, transforms in self.sets if transforms.rotations]

    def log_scales(self, recipe: Recipe) -> list[Tensor]:
        """Return the channel scales that a recipe trains."""
        return [transforms.log_scale for _, transforms in self.sets if recipe.scales(transforms.rotations)]

    def matrices(self) -> list[tuple[Tensor, Tensor]]:
        """See `Transforms.matrices`, for all groups."""
        return self._ordered([transforms.matrices() for _, transforms in self.sets])

    def build(self) -> list[Transform]:
        """Return one for each group, with stored values."""
        return self._ordered([transforms.build() for _, transforms in self.sets])

    def _ordered(self, values: list[list[Any]]) -> list[Any]:
        found = {
            i: value
            for (places, _), of_set in zip(self.sets, values, strict=True)
            for i, value in zip(places, of_set, strict=True)
        }
        return [found[i] for i in range(self.count)]


class TransformStage:
    """Stage 1 (paper, section 4): angles and channel scales, the quantizer's range taken from the rotated weight."""

    def __init__(
        self, block: Block, groups: Groups, layouts: Layouts, transforms: BlockTransforms, recipe: Recipe, rate: float
    ):
        """rate: of learning, for both."""
        self.block, self.groups, self.layouts, self.transforms = block, groups, layouts, transforms
        self.trained = [(theta, rate) for theta in transforms.angles()]
        self.trained += [(log_scale, rate) for log_scale in transforms.log_scales(recipe)]

    def weights(self) -> dict[str, Tensor]:
        result = {}
        for group, (into, out_of) in zip(self.groups, self.transforms.matrices(), strict=True):
            for path in group:
                site, spec = self.block.sites[path], self.layouts[path].spec
                rotated = rotate_dense(site.weight.float(), into)
                rounded = fake_quantize(rotated, spec.bits, spec.group_size, spec.symmetric)
                result[path] = rotate_dense(rounded, out_of)
        return held_by_parameters(self.block.sites, result)


class LearnedQuantize(torch.autograd.Function):
    """w → ŵ on a grid that is trained too, straight-through for rounding (LSQ; EfficientQAT's Block-AP).

    With k = clamp(round(w / s) + z, 0, 2^b - 1) - z and ŵ = k s: where nothing is clipped dŵ/dw = 1, dŵ/ds = k - w / s,
    dŵ/dz = 0; where it is dŵ/dw = 0, dŵ/ds = k, dŵ/dz = -s. By hand, as autograd would keep six tensors of w's size.
    """

    @staticmethod
    def forward(ctx, w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:  # w: [N, C], scale, zero: [N, G]
        ratio = w.view(*scale.shape, -1) / scale[..., None]
        unclipped = ratio.round().add_(zero[..., None])
        steps = unclipped.clamp(0, 2**bits - 1)
        inside = steps == unclipped
        steps.sub_(zero[..., None])
        ctx.save_for_backward(steps - ratio * inside, inside, scale)
        return (steps * scale[..., None]).view(w.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        scale_slope, inside, scale = ctx.saved_tensors
        by_group = grad.reshape(inside.shape)
        grad_w = by_group * inside
        grad_zero = (grad_w - by_group).sum(-1) * scale
        return grad_w.view(grad.shape), (by_group * scale_slope).sum(-1), grad_zero, None


class WeightStage:
    """Stage 2 (paper, section 4; EfficientQAT's Block-AP): weights, quantizer scales and zero points.

    The transform is final. What is trained is the weight in the rotated basis, W_rot = (W · diag(a)) R, not W as in
    the paper: for a gradient step that is a change of variables by an orthogonal matrix and scales, and the codes that
    were trained are those that are stored.
    """

    def __init__(self, block: Block, groups: Groups, layouts: Layouts, transforms: list[Transform], rates: Training):
        self.block, self.layouts = block, layouts
        self.transforms = {p: t for group, t in zip(groups, transforms, strict=True) for p in group}
        self.rotated = {p: t.weight_in(block.sites[p].weight.float()) for p, t in self.transforms.items()}
        grids = {p: self._spanning(w, layouts[p].spec) for p, w in self.rotated.items()}
        self.scales = {p: grid.scale for p, grid in grids.items()}
        self.zeros = {p: grid.zero for p, grid in grids.items()}
        self.trained = [(w, rates.weight_rate) for w in self.rotated.values()]
        self.trained += [(s, rates.quantizer_rate) for s in self.scales.values()]
        self.trained += [(z, rates.quantizer_rate) for p, z in self.zeros.items() if not layouts[p].spec.symmetric]

    @staticmethod
    def _spanning(w: Tensor, spec: Spec) -> WholeGrid:
        return WholeGrid.spanning(*group_range(w, spec.group_size), spec.bits, spec.symmetric)

    def grid(self, path: str) -> tuple[Tensor, Tensor]:
        """Scale and zero point [N, G] as they are stored."""
        scale, zero = self.scales[path], self.zeros[path]
        whole = zero.round().clamp(0, 2 ** self.layouts[path].bits - 1)
        return straight_through(scale, stored(scale.clamp(min=MIN_SCALE))), straight_through(zero, whole)

    def weights(self) -> dict[str, Tensor]:
        result = {}
        for path, transform in self.transforms.items():
            rounded = LearnedQuantize.apply(self.rotated[path], *self.grid(path), self.layouts[path].bits)
            result[path] = transform.weight_out(rounded)
        return held_by_parameters(self.block.sites, result)

    def packed(self) -> dict[str, PackedLinear]:
        result = {}
        for path, transform in self.transforms.items():
            layout = self.layouts[path]
            grid = WholeGrid(*self.grid(path), layout.bits)
            codes = grid.codes(self.rotated[path])
            result[path] = assemble(layout, transform, codes, grid, self.block.sites[path].bias)
        return result


class RefitStage:
    """What is continuous in a rounded block: group scales, channel scales, angles and norm weights; codes are fixed.

    Scales that are powers of two, of weights in MXFP4, are not continuous: they are fixed too.
    """

    def __init__(
        self,
        block: Block,
        groups: Groups,
        packed: dict[str, PackedLinear],
        recipe: Recipe,
        rates: Refit,
        kept_as: torch.dtype,
        device: torch.device,
    ):
        """packed: on any device; kept_as: dtype that the norm weights will be stored in; device: the block's, to train on."""
        self.block, self.groups, self.start, self.kept_as, self.device = block, groups, packed, kept_as, device
        self.transforms = BlockTransforms.stored_in([packed[group[0]].to(device) for group in groups])
        self.steps = {path: _steps(p.to(device)) for path, p in packed.items()}
        self.scales = {path: grid_of(p.to(device)).scale for path, p in packed.items()}
        self.log_scales = {
            path: torch.zeros_like(self.scales[path]) for path, p in packed.items() if not p.layout.weights
        }
        self.norms = {name: p.detach().float().clone() for name, p in _norm_weights(block)}
        self.trained = [(log_scale, rates.scale_rate) for log_scale in self.log_scales.values()]
        self.trained += [(norm, rates.norm_rate) for norm in self.norms.values()]
        self.trained += [(theta, rates.transform_rate) for theta in self.transforms.angles()]
        self.trained += [(log_scale, rates.transform_rate) for log_scale in self.transforms.log_scales(recipe)]

    def scale(self, path: str) -> Tensor:
        """Group scales [N, G] as they are stored."""
        if path not in self.log_scales:
            return self.scales[path]
        scale = self.scales[path] * self.log_scales[path].exp()
        return straight_through(scale, stored(scale.clamp(min=MIN_SCALE)))

    def weights(self) -> dict[str, Tensor]:
        norms = {name: straight_through(norm, self.as_kept(norm)) for name, norm in self.norms.items()}
        result, matrices = {}, {}
        for group, (into, out_of) in zip(self.groups, self.transforms.matrices(), strict=True):
            for path in group:
                if self.start[path].layout.activations is not None:
                    matrices.update(matrices_of(self.block.sites[path], into, out_of))
                rotated = (self.steps[path] * self.scale(path)[..., None]).flatten(1)
                result[path] = rotate_dense(rotated, out_of)
        return norms | matrices | held_by_parameters(self.block.sites, result)

    def as_kept(self, norm: Tensor) -> Tensor:
        return norm.to(self.kept_as).float()

    def packed(self) -> dict[str, PackedLinear]:
        result = {}
        for group, transform in zip(self.groups, self.transforms.build(), strict=True):
            for path in group:
                tensors = transform.tensors()
                if path in self.log_scales:
                    tensors = {"scales": self.scale(path).T.half().contiguous(), **tensors}
                home = self.start[path]["scales"].device
                result[path] = self.start[path].with_tensors(**{name: t.to(home) for name, t in tensors.items()})
        return result


def _steps(packed: PackedLinear) -> Tensor:
    """Return the step of every weight, q - z: int8 [N, G, g], for codes of 8 bits int16, for E2M1 float16."""
    bits, groups = packed.layout.bits, len(packed["scales"])
    codes = unpack(packed["qweight"], bits).T
    if packed.layout.weights is not None:
        return grid_of(packed).steps(codes).half().reshape(len(codes), groups, -1)
    kind = torch.int8 if bits < 8 else torch.int16
    zeros = unpack(packed["qzeros"], bits).T.to(kind)
    return codes.to(kind).reshape(len(codes), groups, -1) - zeros[..., None]


def _norm_weights(block: Block) -> list[tuple[str, nn.Parameter]]:
    """Return full path and parameter of everything one-dimensional that is no linear's and no router's."""
    return [
        (".".join(filter(None, (block.path, path, name))), parameter)
        for path, module in block.module.named_modules()
        if not is_linear(module) and path.rpartition(".")[2] not in ROUTERS
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 1
    ]
