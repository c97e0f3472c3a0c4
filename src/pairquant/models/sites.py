"""Sites: the places of weights in a model. A site gives its weight as [N, C], whatever module holds it.

A site knows the module that holds the weight, how to read and replace the weight, and, where the weight is alone in its module,
which layer runs its quantized form; experts are replaced together (`packed_experts`).
Each kind of module has a class in `KINDS`; for a new kind, add a class and an entry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..layers.embedding import RotatedEmbedding, RowScale
from ..layers.expert_form import ExpertForm
from ..layers.experts import PartPlan, RotatedExperts
from ..layers.linear import RotatedHead, RotatedLinear
from ..spec.experts import pool_of, shared_name
from ..spec.fields import Size
from ..spec.linear import LinearLayout
from ..support.errors import CheckpointError
from .names import OWN, Names

#: Subclasses of `nn.Linear` with a forward of their own that computes the same.
LINEAR_ALL_THE_SAME = ("FalconLinear",)


@dataclass(frozen=True)
class Site(ABC):
    """A weight in a model.

    path: what it is stored under, by the source's names; module: what holds it; place: the module's path in the model.
    """

    path: str
    module: nn.Module
    place: str

    @staticmethod
    @abstractmethod
    def holds(module: nn.Module) -> bool:
        """Tell whether this class is for the module."""

    @cached_property
    @abstractmethod
    def size(self) -> Size:
        """N and C of the weight, and whether there is a bias."""

    @abstractmethod
    def as_held(self, weight: Tensor) -> Tensor:
        """Turn a weight [N, C] into the orientation of the module's parameter; applied twice, it changes nothing."""

    @property
    def pool(self) -> str | None:
        """The pool of an expert's weight, which shares its transform with the others of it; None for every other weight."""
        return None

    @property
    def transform_name(self) -> str | None:
        """What the transform of an expert's weight is named by: its pool, or its own expert's; None for every other weight."""
        return None

    @property
    def parameter(self) -> str:
        """The full name of the parameter that holds the weight."""
        return f"{self.place}.weight"

    @property
    def bias_parameter(self) -> str:
        """The full name of the parameter that holds the bias, where there is one."""
        return f"{self.place}.bias"

    def bias_taken(self, held: Tensor) -> Tensor:
        """Return the bias [N] out of what its parameter holds."""
        return held

    def stored_name(self, name: str) -> str:
        """Return the full name under which a tensor of the quantized weight is stored."""
        return f"{self.path}.{name}"

    def taken(self, held: Tensor) -> Tensor:
        """Return the weight [N, C] out of what the parameter holds; a view of it."""
        return self.as_held(held)

    @property
    def weight(self) -> Tensor:
        """[N, C], a view of the module's parameter."""
        return self.taken(self.module.get_parameter("weight").detach())

    @property
    def bias(self) -> Tensor | None:
        """The bias, [N], or None."""
        return self.module.get_parameter("bias").detach() if self.size.bias else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the module's weight."""
        return self.module.get_parameter("weight").dtype

    def put(self, weight: Tensor) -> None:
        """Replace the module's weight by this one, [N, C], converted to the module's dtype."""
        parameter = self.module.get_parameter("weight")
        parameter.data = self.as_held(weight).to(parameter.dtype)


class LoneSite(Site):
    """The site of a weight that is alone in its module, so that one layer can take the module's place."""

    def packed_module(self, layout: LinearLayout, head: bool = False) -> RotatedLinear:
        """Return the layer that will run the quantized weight in the module's place: on its device, not yet filled.

        head: whether the module is the model's output embedding.
        """
        parameter = self.module.get_parameter("weight")
        return (RotatedHead if head else RotatedLinear)(layout, parameter.device, parameter.dtype)


class LinearSite(LoneSite):
    """The site of an `nn.Linear`. Subclasses with a `forward` of their own, such as routers, are not sites."""

    @staticmethod
    def holds(module: nn.Module) -> bool:
        plain = type(module).forward is nn.Linear.forward or type(module).__name__ in LINEAR_ALL_THE_SAME
        return isinstance(module, nn.Linear) and plain

    @cached_property
    def size(self) -> Size:
        return Size(self.module.in_features, self.module.out_features, self.module.bias is not None)  # type: ignore[arg-type]

    def as_held(self, weight: Tensor) -> Tensor:
        return weight


class Conv1DSite(LoneSite):
    """The site of Transformers' `Conv1D`, which GPT-2 and similar models use: a linear whose parameter is [C, N]."""

    @staticmethod
    def holds(module: nn.Module) -> bool:
        return isinstance(module, Conv1D)

    @cached_property
    def size(self) -> Size:
        in_features, out_features = self.module.get_parameter("weight").shape
        return Size(in_features, out_features, True)

    def as_held(self, weight: Tensor) -> Tensor:
        return weight.T

    def packed_module(self, layout: LinearLayout, head: bool = False) -> RotatedLinear:
        module = super().packed_module(layout, head)
        module.stands_for_linear = False
        return module


class EmbeddingSite(Site):
    """The site of an input embedding: N tokens of C channels. Only `embedding_site` finds it."""

    @staticmethod
    def holds(module: nn.Module) -> bool:
        """Tell whether the module looks rows up, and at most multiplies them by one number."""
        plain = type(module).forward is nn.Embedding.forward
        return isinstance(module, nn.Embedding) and (plain or _scale_of(module) is not None)

    @cached_property
    def size(self) -> Size:
        weight = self.module.get_parameter("weight")
        return Size(weight.shape[1], weight.shape[0], False)

    def as_held(self, weight: Tensor) -> Tensor:
        return weight

    def packed_module(self, layout: LinearLayout) -> RotatedEmbedding:
        """Return the layer that will look up the quantized rows in the module's place: on its device, not yet filled."""
        weight = self.module.get_parameter("weight")
        return RotatedEmbedding(layout, weight.device, weight.dtype, _scale_of(self.module))


def _scale_of(module: nn.Module) -> RowScale | None:
    """Return what an embedding multiplies its rows by, None for nothing; Gemma's is rounded to the dtype of the rows."""
    for name, rounded in (("scalar_embed_scale", True), ("embed_scale", False)):
        if isinstance(value := getattr(module, name, None), (int, float)):
            return RowScale(float(value), rounded)
    return None


@dataclass(frozen=True)
class ExpertSite(Site):
    """One part of one expert, in a module that holds those of all experts in parameters [E, …].

    number: the expert's; part: "gate_proj", "up_proj" or "down_proj", whatever the source calls it; own_transform: whether its
    transform is shared within its expert only.
    """

    number: int
    part: str
    own_transform: bool = False

    @staticmethod
    def holds(module: nn.Module) -> bool:
        """Return whether the module holds experts in a form that is known."""
        return ExpertForm.of(module) is not None

    @classmethod
    def within(cls, place: str, module: nn.Module, names: Names) -> Iterator[ExpertSite]:
        """Yield the sites of all experts, expert by expert."""
        home = names.experts(place)
        has_gate = _form(module).has_gate
        outer = {"gate_proj": 0, "up_proj": 1} if has_gate else {"up_proj": 0}
        joined = "gate_up_proj" if has_gate else "up_proj"
        for number in range(len(module.get_parameter("down_proj"))):
            for part, index in outer.items():
                path = names.expert(place, number, part, joined, index) or f"{home}.{number}.{part}"
                yield cls(path, module, place, number, part)
            path = names.expert(place, number, "down_proj", "down_proj", 0) or f"{home}.{number}.down_proj"
            yield cls(path, module, place, number, "down_proj")

    @property
    def form(self) -> ExpertForm:
        """How the module holds its experts."""
        return _form(self.module)

    @property
    def _own(self) -> str:
        """The name of the parameter that holds this part of all experts."""
        return "gate_up_proj" if self.part != "down_proj" and self.form.has_gate else self.part

    @property
    def parameter(self) -> str:
        return f"{self.place}.{self._own}"

    @property
    def pool(self) -> str:
        return pool_of(self.path)

    @property
    def transform_name(self) -> str:
        return pool_of(self.path, self.own_transform)

    def stored_name(self, name: str) -> str:
        return shared_name(self.path, name, self.own_transform) or super().stored_name(name)

    def _rows(self, whole: Tensor) -> Tensor:
        """This part's rows, of the first dimension of what an expert has of the parameter or its bias."""
        if self._own != "gate_up_proj":
            return whole
        place = ("gate_proj", "up_proj").index(self.part)
        if self.form.is_concatenated:
            return whole.chunk(2)[place]
        return whole[place::2]

    def as_held(self, weight: Tensor) -> Tensor:
        return weight.T if self.form.is_transposed else weight

    def taken(self, held: Tensor) -> Tensor:
        return self._rows(self.as_held(held[self.number]))

    @property
    def weight(self) -> Tensor:
        return self.taken(self.module.get_parameter(self._own).detach())

    @property
    def bias_parameter(self) -> str:
        return f"{self.parameter}_bias"

    def bias_taken(self, held: Tensor) -> Tensor:
        return self._rows(held[self.number])

    @property
    def bias(self) -> Tensor | None:
        held = self.module._parameters.get(f"{self._own}_bias")
        return None if held is None else self.bias_taken(held.detach())

    @property
    def dtype(self) -> torch.dtype:
        return self.module.get_parameter(self._own).dtype

    @cached_property
    def size(self) -> Size:
        rows, columns = self.weight.shape
        return Size(columns, rows, self.bias is not None)

    def put(self, weight: Tensor) -> None:
        self.weight.copy_(weight)

    @staticmethod
    def joined(weights: Sequence[tuple[ExpertSite, Tensor]]) -> Tensor:
        """Return what a parameter holds if its sites, which must all be here, have these weights [N, C].

        Differentiable, with one copy of the weights.
        """
        parts = ("gate_proj", "up_proj", "down_proj")
        module, form = weights[0][0].module, weights[0][0].form
        ordered = sorted(weights, key=lambda item: (item[0].number, parts.index(item[0].part)))
        rows = [weight for _, weight in ordered]
        of_one = sum(site.number == ordered[0][0].number for site, _ in ordered)
        if of_one > 1 and not form.is_concatenated:
            rows = [torch.stack(rows[i : i + of_one], dim=1).flatten(0, 1) for i in range(0, len(rows), of_one)]
        experts = len(module.get_parameter("down_proj"))
        whole = torch.cat(rows).view(experts, -1, rows[0].shape[-1])
        return whole.mT if form.is_transposed else whole


def _form(module: nn.Module) -> ExpertForm:
    form = ExpertForm.of(module)
    assert form is not None, f"{type(module).__name__} holds experts"
    return form


def packed_experts(found: Sequence[tuple[ExpertSite, LinearLayout]], per_expert: bool = False) -> RotatedExperts:
    """Return what runs the quantized experts of one module in its place, on its device, empty.

    found: every site of the module and its layout, which is the same for all experts; per_expert: whether each expert has a
    transform of its own. Raises `CheckpointError` for experts
    that are missing or differ.
    """
    plans: dict[str, PartPlan] = {}
    for site, layout in found:
        plan = PartPlan(site.path.rpartition(".")[2], layout)
        if plans.setdefault(site.part, plan) != plan:
            raise CheckpointError(
                f"{site.path} is stored otherwise than the other experts: {layout.spec}, {layout.size}"
            )
    site, _ = found[0]
    whole = sum(1 for _ in ExpertSite.within(site.place, site.module, OWN))
    if len(found) != whole:
        raise CheckpointError(f"the checkpoint holds {len(found)} weights of the experts of {site.place}, not {whole}")
    device = site.module.get_parameter("down_proj").device
    return RotatedExperts(site.module, plans, len(site.module.get_parameter("down_proj")), device, per_expert)


def held_by_parameters(sites: Mapping[str, Site], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return full name → what the parameter holds if the sites have these weights, [N, C] by path; differentiable.

    Of a module's experts, either all are among `weights` or none.
    """
    held: dict[str, Tensor] = {}
    experts: dict[str, list[tuple[ExpertSite, Tensor]]] = {}
    for path, weight in weights.items():
        site = sites[path]
        if isinstance(site, ExpertSite):
            experts.setdefault(site.parameter, []).append((site, weight))
        else:
            held[site.parameter] = site.as_held(weight)
    return held | {parameter: ExpertSite.joined(found) for parameter, found in experts.items()}


#: Kinds of modules that hold one weight.
KINDS: tuple[type[LoneSite], ...] = (LinearSite, Conv1DSite)


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer of any kind, even one that is not a site."""
    return isinstance(module, (nn.Linear, Conv1D))


def site_of(place: str, module: nn.Module, names: Names = OWN) -> Site | None:
    """Return the site of a module that holds one weight; None for every other."""
    kind = next((kind for kind in KINDS if kind.holds(module)), None)
    return None if kind is None else kind(names.module(place), module, place)


def sites_in(module: nn.Module, prefix: str = "", names: Names = OWN) -> Iterator[Site]:
    """Yield every site below a module, in the module's order; prefix: the path of the module itself."""
    for name, child in module.named_modules():
        path = ".".join(part for part in (prefix, name) if part)
        if ExpertSite.holds(child):
            yield from ExpertSite.within(path, child, names)
        elif site := site_of(path, child, names):
            yield site


def embedding_of(model: nn.Module, kind: str) -> nn.Module | None:
    """Return the model's "input" or "output" embedding; None if it has none."""
    find: Callable[[], nn.Module | None] = getattr(model, f"get_{kind}_embeddings", lambda: None)
    try:
        return find()
    except NotImplementedError:  # Transformers' answer for a class that does not say where its embedding is
        return None


def embedding_site(model: nn.Module, names: Names = OWN) -> EmbeddingSite | None:
    """Return the site of a model's input embedding; None for a model without one, or one that does more than look rows up."""
    module = embedding_of(model, "input")
    place = next((path for path, found in model.named_modules() if found is module), "")
    if module is None or not place or not EmbeddingSite.holds(module):
        return None
    return EmbeddingSite(names.module(place), module, place)


def stored_sites(model: nn.Module, names: Names = OWN) -> dict[str, Site]:
    """Return every site of a model that a checkpoint may hold packed, by path: those in it, and its input embedding."""
    found = {site.path: site for site in sites_in(model, names=names)}
    embedding = embedding_site(model, names)
    return found if embedding is None else {**found, embedding.path: embedding}
