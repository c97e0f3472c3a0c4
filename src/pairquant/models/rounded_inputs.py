"""Let a block with decoded weights read its inputs as the quantized layers do: rotated, rounded, rotated back.

With x_rot = (x · diag(1/a)) R, a layer computes round(x_rot) times its rotated weight. That is the same as its decoded weight
times round(x_rot) Rᵀ diag(a), which hooks put in the place of x. Whoever runs a block in the place of the quantized model
(the walk, block-wise and end-to-end training, benchmarks) does it by `rounded_inputs` or `round_inputs`, so that it is done
in one way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.activations import rounded_for_training
from ..core.linear import Transform, transform_of
from ..core.rotation import rotate_dense
from ..layers.expert_form import ExpertForm
from ..spec.linear import LinearLayout, PackedLinear
from .inputs import inner_product
from .sites import ExpertSite, Site

#: Called with the path of each linear, what it was given, and what it reads instead: [..., C] each.
Seen = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True)
class InputRounding:
    """How the input of one linear is rounded. into: diag(1/a) R; out_of: Rᵀ diag(a); float32 [G, g, g] each.

    activations: a format of `spec.activations`; group_size: the layer's.
    """

    into: Tensor
    out_of: Tensor
    activations: str
    group_size: int

    @classmethod
    def of(cls, transform: Transform, layout: LinearLayout) -> InputRounding | None:
        """Return that of a linear with this transform; None for a layout whose activations are not rounded."""
        if layout.activations is None:
            return None
        inverse = transform.inverse_scales.view(layout.num_groups, layout.group_size)
        into, out_of = inverse[:, :, None] * transform.matrix, transform.matrix.mT / inverse[:, None, :]
        return cls(into, out_of, layout.activations, layout.group_size)

    def __call__(self, x: Tensor) -> Tensor:
        """Return round((x diag(1/a)) R) Rᵀ diag(a) in x's dtype, computed in float32: x floating [..., C].

        Differentiable in x and both matrices; see `rounded_for_training` for the gradient.
        """
        into, out_of = self.into.to(x.device), self.out_of.to(x.device)  # the module may have moved
        with torch.autocast(x.device.type, enabled=False):
            x_rot = rotate_dense(x.float(), into)
            x_rounded = rounded_for_training(x_rot, self.activations, self.group_size)
            return rotate_dense(x_rounded, out_of).to(x.dtype)


#: What the names of the two matrices end with where training keeps them beside the weights of a block.
INTO, OUT_OF = ":into", ":out_of"


def matrices_of(site: Site, into: Tensor, out_of: Tensor) -> dict[str, Tensor]:
    """Return the matrices that the rounding of a site's input follows from, by name.

    into, out_of: those of its weight, diag(a) R and Rᵀ diag(1/a), [G, g, g]. Experts that share a transform share the names.
    """
    name = site.transform_name or site.path
    return {f"{name}{INTO}": out_of.mT, f"{name}{OUT_OF}": into.mT}


def is_matrix(name: str) -> bool:
    """Tell whether this is a name of `matrices_of`."""
    return name.endswith((INTO, OUT_OF))


def roundings_from(
    sites: Mapping[str, Site], layouts: Mapping[str, LinearLayout], matrices: Mapping[str, Tensor]
) -> dict[str, InputRounding]:
    """Return how the inputs of these sites are rounded, by path, from what `matrices_of` returned for them."""
    found = {}
    for path, site in sites.items():
        name = site.transform_name or path
        if f"{name}{INTO}" in matrices and (activations := layouts[path].activations) is not None:
            both = matrices[f"{name}{INTO}"], matrices[f"{name}{OUT_OF}"]
            found[path] = InputRounding(*both, activations, layouts[path].group_size)
    return found


def roundings_of(
    sites: Mapping[str, Site], packed: Mapping[str, PackedLinear], device: torch.device
) -> dict[str, InputRounding]:
    """Return how the inputs of packed linears are rounded, by path; nothing for those whose activations are not.

    Experts that share a transform share what is returned.
    """
    names = {path: sites[path].transform_name or path for path in packed}
    shared: dict[str, InputRounding] = {}
    for path, linear in packed.items():
        if linear.layout.activations is not None and names[path] not in shared:
            rounding = InputRounding.of(transform_of(linear.to(device)), linear.layout)
            assert rounding is not None, "the layout names a format"
            shared[names[path]] = rounding
    return {path: shared[name] for path, name in names.items() if name in shared}


def round_inputs(sites: Mapping[str, Site], roundings: Mapping[str, InputRounding], seen: Seen | None = None) -> Undo:
    """Let the modules of these sites round what they read, from now on. Returns what ends that.

    roundings: by path; sites without one read their input as it is, or as an earlier call that has not ended lets them. seen:
    is told of every input that is rounded by these.
    """
    undo = Undo()
    experts: dict[str, _RoundedExperts] = {}
    for path, rounding in roundings.items():
        site = sites[path]
        if isinstance(site, ExpertSite):
            mine = experts.setdefault(site.place, _RoundedExperts(site.module, site.form))
            mine.add(site, rounding, seen)
        else:
            hook = partial(_rounding_hook, path, rounding, seen)
            undo.steps.append(site.module.register_forward_pre_hook(hook).remove)
    for replaced in experts.values():
        undo.steps.append(replaced.put())
    return undo


@contextmanager
def rounded_inputs(
    sites: Mapping[str, Site], roundings: Mapping[str, InputRounding], seen: Seen | None = None
) -> Iterator[None]:
    """Do `round_inputs` for as long as the context is open."""
    undo = round_inputs(sites, roundings, seen)
    try:
        yield
    finally:
        undo()


@dataclass
class Undo:
    """Ends what `round_inputs` began. steps: called once each."""

    steps: list[Callable[[], None]] = field(default_factory=list)

    def __call__(self) -> None:
        while self.steps:
            self.steps.pop()()


def _rounding_hook(path: str, rounding: InputRounding, seen: Seen | None, module: nn.Module, args: tuple) -> tuple:
    x = rounding(args[0])
    if seen is not None:
        seen(path, args[0], x)
    return (x, *args[1:])


class _RoundedExperts:
    """The forward pass of a module of experts in which each reads rounded inputs."""

    def __init__(self, module: nn.Module, form: ExpertForm):
        self.module, self.form = module, form
        #: By the expert's number and whether it is the last product; the paths are of the parts that read the input.
        self.roundings: dict[tuple[int, bool], tuple[list[str], InputRounding, Seen | None]] = {}

    def add(self, site: ExpertSite, rounding: InputRounding, seen: Seen | None) -> None:
        """Round what this part of an expert reads; parts that read the same have one transform."""
        key = site.number, site.part == "down_proj"
        self.roundings.setdefault(key, ([], rounding, seen))[0].append(site.path)

    def put(self) -> Callable[[], None]:
        """Take the place of the module's forward pass; return what ends that. What rounds there already goes on rounding."""
        before = self.module.__dict__.get("forward")
        if isinstance(earlier := getattr(before, "__self__", None), _RoundedExperts):
            self.roundings = {**earlier.roundings, **self.roundings}
        self.module.forward = self.forward  # type: ignore[method-assign]

        def undo() -> None:
            del self.module.forward
            if before is not None:
                self.module.forward = before  # type: ignore[method-assign]

        return undo

    def forward(self, hidden_states: Tensor, *routing: Any, **named: Any) -> Tensor:
        """See `ExpertForm`."""
        flat, own = hidden_states.flatten(0, -2), self.module._parameters
        down, bias = own["down_proj"], own.get("down_proj_bias")
        assert down is not None, "experts have a last product"
        count = len(down)
        hidden, index, weights, rows = self.form.routed(count, hidden_states, *routing, **named)
        output = torch.zeros_like(hidden)
        for number in torch.unique(index).tolist():
            if number >= count:  # stands for no expert
                continue
            token, place = torch.where(index == number)
            inner = inner_product(self.module, self.form, number, self._rounded(number, False, hidden[token]))
            weight = down[number].T if self.form.is_transposed else down[number]
            y = F.linear(self._rounded(number, True, inner), weight, None if bias is None else bias[number])
            output = output.index_add(0, token, (y * weights[token, place, None]).to(output.dtype))
        if self.form.returns_input:
            output = output + hidden * (weights * (index >= count)).sum(-1, keepdim=True).to(hidden.dtype)
        if rows is not None:
            output = torch.zeros_like(flat).index_copy(0, rows, output)
        return output.view(hidden_states.shape)

    def _rounded(self, number: int, last: bool, x: Tensor) -> Tensor:
        if (found := self.roundings.get((number, last))) is None:
            return x
        paths, rounding, seen = found
        y = rounding(x)
        if seen is not None:
            for path in paths:
                seen(path, x, y)
        return y
