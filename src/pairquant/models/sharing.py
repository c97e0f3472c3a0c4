"""Layers that several places of a model share: one layer at the first place, and a stand-in at the others that calls it.

Zamba runs one attention block at several depths. Transformers gives every depth modules of its own and ties their
parameters; a quantized layer has no parameter that could be tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Borrowed(nn.Module):
    """Stands where a layer of an earlier place is used again. It has no tensors: calls go to whatever is at that place.

    place: the path of the layer that is used.
    """

    def __init__(self, owner: nn.Module, name: str, place: str):
        super().__init__()
        self._owner, self._name = (owner,), name  # in a tuple, so that it is no submodule
        self.place = place

    @property
    def lender(self) -> nn.Module:
        """The layer that is there now."""
        return self._owner[0].get_submodule(self._name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.lender(x, *args, **kwargs)
        return output.to(x.device) if isinstance(output, torch.Tensor) else output

    def extra_repr(self) -> str:
        return self.place


def fold_shared(model: nn.Module) -> None:
    """Put a `Borrowed` wherever a layer is tied, with all of its parameters, to a layer of the same kind elsewhere.

    What Transformers knows of tied parameters (`all_tied_weights_keys`) then no longer names those layers. Embeddings that are
    tied, and parameters of modules that hold other modules, stay as they are.
    """
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    places: dict[str, dict[str, str]] = {}
    for target, source in tied.items():
        place, _, own = target.rpartition(".")
        places.setdefault(place, {})[own] = source
    lenders = {place: lender for place, held in places.items() if (lender := _lender(model, place, held)) is not None}
    if not lenders:
        return
    _forget(model, set(lenders))
    for place, lender in lenders.items():
        owner, _, name = lender.rpartition(".")
        parent, _, own = place.rpartition(".")
        setattr(model.get_submodule(parent), own, Borrowed(model.get_submodule(owner), name, lender))


def _lender(model: nn.Module, place: str, held: Mapping[str, str]) -> str | None:
    """Return the path of the layer that the one at `place` is tied to. held: its own parameter → the full name of the other."""
    try:
        module = model.get_submodule(place)
    except AttributeError:
        return None
    others = {source.rpartition(".")[0] for source in held.values()}
    whole = {name for name, _ in module.named_parameters()} == set(held)
    if len(others) != 1 or not whole or any(module.children()) or isinstance(module, nn.Embedding):
        return None
    (lender,) = others
    return lender if type(model.get_submodule(lender)) is type(module) else None


def _forget(model: nn.Module, places: set[str]) -> None:
    """Take the parameters at these places out of what Transformers ties."""
    for prefix, module in model.named_modules():
        find = getattr(module, "get_expanded_tied_weights_keys", None)
        if find is None or not getattr(module, "_tied_weights_keys", None):
            continue
        mapping = find()
        full = {name: ".".join(part for part in (prefix, name) if part) for name in mapping}
        kept = {name: source for name, source in mapping.items() if full[name].rpartition(".")[0] not in places}
        if len(kept) < len(mapping):
            module._tied_weights_keys = kept  # type: ignore[assignment]
    known: Any = model
    known.all_tied_weights_keys = {
        target: source
        for target, source in known.all_tied_weights_keys.items()
        if target.rpartition(".")[0] not in places
    }


def lenders_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return place → layer, of the layers elsewhere that a module uses."""
    return {each.place: each.lender for each in module.modules() if isinstance(each, Borrowed)}


def borrowed_names(model: nn.Module) -> set[str]:
    """Return the names that tensors of shared layers would have at the places that only borrow them."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, Borrowed)
        for name, _ in module.lender.named_parameters()
    }


def settle_scales(model: nn.Module) -> None:
    """Keep RWKV from dividing weights of later blocks by powers of two at the first forward pass, which codes do not allow.

    It does so, and halves the states, every `rescale_every` blocks, for the range of float16 alone: the model computes the
    same function without.
    """
    if getattr(config := getattr(model, "config", None), "rescale_every", 0):
        config.rescale_every = 0  # type: ignore[union-attr]
