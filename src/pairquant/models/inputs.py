"""What the linears of a block read: those that are handed the very same tensor read one input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from .sites import Site


@dataclass
class Inputs:
    """The distinct inputs of a block's linears in one forward pass.

    readers[n]: paths of the linears that read tensors[n], float [tokens, C].
    """

    tensors: list[Tensor] = field(default_factory=list)
    readers: list[list[str]] = field(default_factory=list)


@contextmanager
def recorded_inputs(sites: Mapping[str, Site]) -> Iterator[Inputs]:
    """Collect what the module of each site reads while the context is open."""
    inputs = Inputs()
    originals: list[Tensor] = []

    def hook(path: str):
        def record(module: nn.Module, args: tuple) -> None:
            for i, seen in enumerate(originals):
                if seen is args[0]:
                    inputs.readers[i].append(path)
                    return
            originals.append(args[0])
            inputs.tensors.append(args[0].detach().flatten(0, -2))
            inputs.readers.append([path])

        return record

    handles = [site.module.register_forward_pre_hook(hook(path)) for path, site in sites.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
