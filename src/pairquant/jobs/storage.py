"""What the files of any model, packed or not, say of how it is stored."""

from __future__ import annotations

from torch import nn

from ..checkpoint.read import Checkpoint, ModelFiles
from ..spec.activations import UNROUNDED


def bits_per_weight(files: ModelFiles, network: nn.Module) -> float | None:
    """Return the bits per weight: of a packed checkpoint those of its quantized linears, of a plain model its files' size over
    its parameters, and None of a model that others quantized, whose parameters are not its weights.
    """
    if files.is_packed:
        return Checkpoint.open(files).bits_per_weight()
    if files.quantized_by_others:
        return None
    return files.size_bytes() * 8 / sum(p.numel() for p in network.parameters())


def activations(files: ModelFiles) -> str | None:
    """Return what the layers of a model round their inputs to (`Checkpoint.activations`); None if others quantized it."""
    if files.is_packed:
        return Checkpoint.open(files).activations()
    return None if files.quantized_by_others else UNROUNDED
