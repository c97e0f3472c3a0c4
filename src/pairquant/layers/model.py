"""Find, merge, prepare and insert the quantized layers of a whole model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from ..kernels.run.weights import MAX_SEGMENTS
from ..spec.linear import Spec
from .embedding import RotatedEmbedding
from .experts import RotatedExperts
from .linear import RotatedLinear
from .merging import Merged

#: Names of layers that read the same input and are called one after the other, so that one launch can run them.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def link_siblings(model: nn.Module) -> None:
    """Merge the layers named in `SIBLINGS` if they have the same in_features and the same spec."""
    for parent in model.modules():
        for names in SIBLINGS:
            layers = [layer for name in names if isinstance(layer := getattr(parent, name, None), RotatedLinear)]
            like = {(layer.in_features, layer.layout.spec) for layer in layers}
            if len(layers) == len(names) <= MAX_SEGMENTS and len(like) == 1:
                merged = Merged(layers)
                for layer in layers:
                    layer.merge_into(merged)


def siblings(paths: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the groups of these paths that engines run as one layer, by the names in `SIBLINGS`."""
    known = set(paths)
    found: dict[tuple[str, ...], None] = {}
    for path in known:
        parent, _, name = path.rpartition(".")
        names = next((names for names in SIBLINGS if name in names), ())
        group = tuple(f"{parent}.{other}" for other in names if f"{parent}.{other}" in known)
        if len(group) > 1:
            found[group] = None
    return sorted(found)


def unlike_siblings(specs: Mapping[str, Spec]) -> list[tuple[str, ...]]:
    """Return the groups of quantized layers that engines run as one layer although their specs differ.

    specs: path → spec of every quantized layer. Returns the paths of each group.
    """
    return [group for group in siblings(specs) if len({specs[path] for path in group}) > 1]


def prepare(model: nn.Module) -> nn.Module:
    """Prepare every layer that runs on a GPU now, instead of at its first forward pass; return the model."""
    for _, layer in rotated_linears(model):
        layer.prepare()
    for _, embedding in rotated_embeddings(model):
        if not embedding.theta.is_meta:  # an offloaded one stays on disk
            embedding.prepare()
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for _, experts in rotated_experts(model):
        experts.prepare(dtype)
    return model


def rotated_experts(model: nn.Module) -> Iterator[tuple[str, RotatedExperts]]:
    """Path and module of every block's quantized experts."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, RotatedExperts))


def rotated_embeddings(model: nn.Module) -> Iterator[tuple[str, RotatedEmbedding]]:
    """Yield the path and the module of every quantized input embedding."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, RotatedEmbedding))


def rotated_linears(model: nn.Module) -> Iterator[tuple[str, RotatedLinear]]:
    """Yield the path and the module of every quantized linear."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, RotatedLinear))


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at `path` by `module`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
