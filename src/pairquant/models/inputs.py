"""Record what the linears of a block read. Linears that are called with the same tensor object read the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.expert_form import ExpertForm
from .sites import ExpertSite, Site


@dataclass
class Inputs:
    """The distinct inputs of a block's linears in one forward pass.

    readers[n]: paths of the linears that read tensors[n], float [tokens, C], or a function that returns this tensor each
    time it is called, where all of them together would take too much memory; routed[n]: whether these are inputs of
    experts, which have no counterpart in the original model: its router may choose other tokens.
    """

    tensors: list[Tensor | Callable[[], Tensor]] = field(default_factory=list)
    readers: list[list[str]] = field(default_factory=list)
    routed: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.routed += [False] * (len(self.tensors) - len(self.routed))

    def add(self, tensor: Tensor | Callable[[], Tensor], readers: list[str], routed: bool = False) -> None:
        """Add a distinct input."""
        self.tensors.append(tensor)
        self.readers.append(readers)
        self.routed.append(routed)

    def tensor(self, number: int) -> Tensor:
        """Return tensors[number], computed now if it is a function."""
        held = self.tensors[number]
        return held if isinstance(held, Tensor) else held()


#: Path → what rounds the input of the linear there, [..., C] → [..., C].
Roundings = Mapping[str, Callable[[Tensor], Tensor]]


@contextmanager
def recorded_inputs(
    sites: Mapping[str, Site],
    routed: bool = True,
    all_experts: bool = False,
    roundings: Roundings = MappingProxyType({}),
) -> Iterator[Inputs]:
    """Collect what the module of each site reads while the context is open.

    routed: also what each expert reads: the tokens that its router gives it, and the inner activations that follow. These
    are computed, from the weights that the experts have at that time, when they are asked for.
    all_experts: as if the router gave every token to every expert. What the experts return stays as it is.
    roundings: of what experts' first products read, where the module rounds that already: inner activations follow from it.
    """
    inputs = Inputs()
    originals: dict[int, Tensor] = {}

    def record(path: str, module: nn.Module, args: tuple) -> None:
        for i, seen in originals.items():
            if seen is args[0]:
                inputs.readers[i].append(path)
                return
        originals[len(inputs.tensors)] = args[0]
        inputs.add(args[0].detach().flatten(0, -2), [path])

    def record_experts(mine: list[ExpertSite], module: nn.Module, args: tuple, kwargs: dict) -> None:
        of_experts = _of_all_experts if all_experts else _of_experts
        hidden, index, *_ = mine[0].form.routed(len(module.get_parameter("down_proj")), *args, **kwargs)
        for tensor, readers in of_experts(mine, module, hidden.detach(), index, roundings):
            inputs.add(tensor, readers, routed=True)

    handles = []
    homes: dict[str, list[ExpertSite]] = {}
    for path, site in sites.items():
        if isinstance(site, ExpertSite):
            homes.setdefault(site.place, []).append(site)
        else:
            handles.append(site.module.register_forward_pre_hook(partial(record, path)))
    for mine in homes.values() if routed else ():
        hook = partial(record_experts, mine)
        handles.append(mine[0].module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _of_experts(
    sites: Iterable[ExpertSite], module: nn.Module, hidden: Tensor, index: Tensor, roundings: Roundings
) -> Iterator[tuple[Callable[[], Tensor], list[str]]]:
    """Yield what each expert reads, [its tokens, C], and by which of its parts; experts without tokens read nothing."""

    def tokens(number: int) -> Tensor:
        return hidden[(index == number).any(-1)]

    def inner(number: int, mine: list[ExpertSite]) -> Tensor:
        return inner_activations(module, number, _as_multiplied(tokens(number), mine, roundings))

    for number, mine in _by_number(sites).items():
        if paths := [site.path for site in mine if site.part != "down_proj"]:
            yield partial(tokens, number), paths
        if paths := [site.path for site in mine if site.part == "down_proj"]:
            yield partial(inner, number, mine), paths


def _of_all_experts(
    sites: Iterable[ExpertSite], module: nn.Module, hidden: Tensor, _: Tensor, roundings: Roundings
) -> Iterator[tuple[Tensor | Callable[[], Tensor], list[str]]]:
    """Yield what the experts would read if each of them got every token, [tokens, C], and by which of their parts."""
    by_number = _by_number(sites)
    if outer := [site.path for mine in by_number.values() for site in mine if site.part != "down_proj"]:
        yield hidden, outer
    for number, mine in by_number.items():
        if paths := [site.path for site in mine if site.part == "down_proj"]:
            yield partial(_inner_of_all, module, number, hidden, mine, roundings), paths


def _inner_of_all(
    module: nn.Module, number: int, hidden: Tensor, mine: list[ExpertSite], roundings: Roundings
) -> Tensor:
    """Return what the last product of an expert would read if it got every token, [tokens, I]."""
    return inner_activations(module, number, _as_multiplied(hidden, mine, roundings))


def _as_multiplied(x: Tensor, sites: Iterable[ExpertSite], roundings: Roundings) -> Tensor:
    """Return what the first products of an expert multiply for what it reads, x [T, H]: rounded, if they round; sites: its parts."""
    found = [roundings[site.path] for site in sites if site.part != "down_proj" and site.path in roundings]
    return found[0](x) if found else x  # parts that read the same have one transform


def _by_number(sites: Iterable[ExpertSite]) -> dict[int, list[ExpertSite]]:
    """Return the sites of each expert, by its number."""
    found: dict[int, list[ExpertSite]] = {}
    for site in sites:
        found.setdefault(site.number, []).append(site)
    return found


@torch.no_grad()
def inner_activations(module: nn.Module, number: int, x: Tensor) -> Tensor:
    """Return what the last product of an expert reads, [T, I], for its input x [T, H]."""
    form = ExpertForm.of(module)
    assert form is not None, "the sites of a module know its form"
    return inner_product(module, form, number, x)


def inner_product(module: nn.Module, form: ExpertForm, number: int, x: Tensor) -> Tensor:
    """Return what the last product of an expert reads, [T, I], for its input x [T, H]; differentiable."""
    name = "gate_up_proj" if form.has_gate else "up_proj"
    held, bias = module._parameters[name], module._parameters.get(f"{name}_bias")
    assert held is not None, "the form says which parameters there are"
    weight = held[number].T if form.is_transposed else held[number]
    return form.between(module, F.linear(x, weight, None if bias is None else bias[number]))
