"""Fold transforms into a plain model: it computes the same afterwards, and its weights are easier to round.

Three kinds of transforms vanish in the weights around them (x a row vector, R orthogonal, S diagonal):

    stream   h → h R for the hidden states between the blocks: embedding E R, what writes to the stream Rᵀ W, what reads
             from it W R. An RMSNorm commutes with R once its weight is folded into its readers, and gets a new one, 1/S.
    pair     x → x R S⁻¹ between two layers with nothing but a product between them: values and o_proj, per head; up_proj and
             down_proj of a gated MLP, scales only.
    norm     x → x S⁻¹ for what a norm hands to its readers, where its block does not allow the first.

Which of them a block allows is found out by `foldable`. Folding into norms and layers before goes back to AWQ (arXiv
2306.00978) and SmoothQuant (2211.10438), rotating the stream to QuaRot (2404.00456) and SpinQuant (2405.16406).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core.rotation import rotate_dense


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight [..., N, C] in a module: of a linear layer, a router, an embedding, or of all experts of a block, [E, N, C].

    place: the module's path in the model; name: the parameter's in the module; turned: whether it holds [..., C, N].
    """

    place: str
    module: nn.Module
    name: str = "weight"
    turned: bool = False

    @property
    def weight(self) -> Tensor:
        """[..., N, C], a view of the parameter."""
        held = self.module.get_parameter(self.name).detach()
        return held.mT if self.turned else held

    @property
    def bias(self) -> Tensor | None:
        """[..., N], or None."""
        held = self.module._parameters.get("bias" if self.name == "weight" else f"{self.name}_bias")
        return None if held is None else held.detach()

    def put(self, weight: Tensor) -> None:
        """Replace the weight, [..., N, C], by a tensor of its own: what held the old one keeps it."""
        parameter = self.module.get_parameter(self.name)
        parameter.data = (weight.mT if self.turned else weight).contiguous().to(parameter.dtype)

    def put_bias(self, bias: Tensor) -> None:
        """Replace the bias, [..., N]."""
        parameter = self.module.get_parameter("bias" if self.name == "weight" else f"{self.name}_bias")
        parameter.data = bias.to(parameter.dtype)

    def transform_columns(self, matrices: Tensor | None, scales: Tensor | None) -> None:
        """Replace W by W R diag(scales): it then reads x R diag(1/scales). matrices: [G, g, g]; scales: [C]."""
        self.put(_transformed(self.weight, matrices, scales))

    def transform_rows(self, matrices: Tensor | None, scales: Tensor | None, first: int = 0) -> None:
        """Let the outputs from `first` on become y R diag(1/scales). matrices: [G, g, g]; scales: [N - first]."""
        inverse = None if scales is None else 1 / scales
        weight, bias = self.weight, self.bias
        after = _transformed(weight[..., first:, :].mT, matrices, inverse).mT
        self.put(torch.cat((weight[..., :first, :].to(after.dtype), after), dim=-2))
        if bias is not None:
            self.put_bias(
                torch.cat((bias[..., :first].float(), _transformed(bias[..., first:], matrices, inverse)), dim=-1)
            )


def _transformed(x: Tensor, matrices: Tensor | None, scales: Tensor | None) -> Tensor:
    """x R diag(scales) for x [..., C], in float32."""
    x = x.float()
    x = x if matrices is None else rotate_dense(x, matrices)
    return x if scales is None else x * scales


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm and the weights that read its output. added: what its class adds to the stored weight, 1 for Gemma's.

    rotates: whether it commutes with rotations when its weight is 1 everywhere, as an RMSNorm without bias does.
    """

    place: str
    module: nn.Module
    added: float
    rotates: bool
    readers: tuple[Matrix, ...]

    @property
    def weight(self) -> Tensor:
        """What the normalised states are multiplied by, float32 [H]."""
        return self.module.get_parameter("weight").detach().float() + self.added

    def put(self, weight: Tensor) -> None:
        """Replace what the normalised states are multiplied by."""
        parameter = self.module.get_parameter("weight")
        parameter.data = (weight - self.added).to(parameter.dtype)

    def absorb(self) -> None:
        """Fold the weight into the readers, which leaves 1 everywhere."""
        weight = self.weight
        for reader in self.readers:
            reader.transform_columns(None, weight)
        self.put(torch.ones_like(weight))

    def transform(self, matrices: Tensor | None, scales: Tensor, stored: torch.dtype) -> None:
        """Divide the weight by `scales` [H], and let the readers expect the stream rotated by `matrices` [G, g, g].

        stored: the dtype in which the weight will be stored; the readers are multiplied by what its rounded value leaves.
        """
        before, bias = self.weight, self.module._parameters.get("bias")
        after = (before / scales - self.added).to(stored).float() + self.added
        usable = (after != 0) & (before != 0) & after.isfinite()
        after = torch.where(usable, after, before)
        exact = torch.where(usable, before / after, 1.0)
        for reader in self.readers:
            reader.transform_columns(matrices, exact)
        self.put(after)
        if bias is not None:
            bias.data = (bias.detach().float() / exact).to(bias.dtype)


@dataclass(frozen=True, eq=False)
class Pair:
    """Two weights with nothing but a product between them: outputs of `rows` from `first` on are inputs of `columns`.

    size: so many outputs; repeats: how many heads of the inputs share one of the outputs; head: channels of a head, None where
    there are no heads; rotates: whether the channels of a head may be rotated; if not, they may only be scaled.
    """

    rows: Matrix
    columns: Matrix
    size: int
    first: int = 0
    repeats: int = 1
    head: int | None = None
    rotates: bool = False

    @property
    def name(self) -> str:
        """What tells it from other pairs of the model."""
        return self.columns.place

    def spread(self, per_output: Tensor, heads: int) -> Tensor:
        """Return what belongs to each input, from what belongs to each output, [heads · m, ...]."""
        if self.repeats == 1:
            return per_output
        by_head = per_output.view(heads, -1, *per_output.shape[1:])
        return by_head.repeat_interleave(self.repeats, dim=0).flatten(0, 1)

    def transform(self, matrices: Tensor | None, scales: Tensor) -> None:
        """Let the outputs become y R diag(1/scales). matrices: [size / g, g, g], where g divides a head; scales: [size]."""
        heads = self.size // (self.head or self.size)
        self.rows.transform_rows(matrices, scales, self.first)
        wide = None if matrices is None else self.spread(matrices, heads)
        self.columns.transform_columns(wide, self.spread(scales, heads))


@dataclass(frozen=True)
class Foldable:
    """What a block allows. norms: those that read the stream; writers: what is added to it; pairs: see `Pair`.

    reason: why the stream cannot be rotated here; None if it can.
    """

    norms: tuple[Norm, ...] = ()
    writers: tuple[Matrix, ...] = ()
    pairs: tuple[Pair, ...] = ()
    reason: str | None = None


@dataclass
class Transforms:
    """The values of all transforms of a model.

    stream: R of the stream, [H/g, g, g], or None; norms: S of each norm by place, [H]; pairs: R (or None) and S of each pair
    by name. All float32.
    """

    stream: Tensor | None = None
    norms: dict[str, Tensor] = field(default_factory=dict)
    pairs: dict[str, tuple[Tensor | None, Tensor]] = field(default_factory=dict)

    def to(self, device: torch.device) -> Transforms:
        """Return a copy on a device."""
        return Transforms(
            None if self.stream is None else self.stream.to(device),
            {name: scales.to(device) for name, scales in self.norms.items()},
            {
                name: (None if matrices is None else matrices.to(device), scales.to(device))
                for name, (matrices, scales) in self.pairs.items()
            },
        )


def fold(found: Foldable, transforms: Transforms, stored: Mapping[str, torch.dtype] | None = None) -> None:
    """Rewrite a block's weights, in memory, so that it computes the same on the transformed stream.

    stored: the dtypes in which norm weights, by full name, will be stored; that of the model in memory if not given.
    """
    for norm in found.norms:
        if transforms.stream is not None:
            norm.absorb()
        kept = norm.module.get_parameter("weight")
        scales = transforms.norms.get(norm.place, torch.ones_like(kept, dtype=torch.float32))
        norm.transform(transforms.stream, scales, (stored or {}).get(f"{norm.place}.weight", kept.dtype))
    for writer in found.writers if transforms.stream is not None else ():
        writer.transform_rows(transforms.stream, None)
    for pair in found.pairs:
        if pair.name in transforms.pairs:
            pair.transform(*transforms.pairs[pair.name])


@contextmanager
def restored(*modules: nn.Module) -> Iterator[None]:
    """Put the modules' parameters back when the context closes: `fold` gives them other tensors."""
    before = {parameter: parameter.data for module in modules for parameter in module.parameters()}
    try:
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data
