"""A checkpoint without transforms in a format of another program: every code stays as it is, only its place changes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial

import torch
from torch import Tensor

from ..formats.base import REMEDY, Contents, Format
from ..models.names import Names
from ..models.sites import EmbeddingSite, ExpertSite, Site
from ..spec.fields import Field
from ..support.errors import CheckpointError, ConfigError
from ..support.formatting import counted
from .original import sites_of
from .read import Checkpoint, ModelFiles
from .write import Entry

#: Families whose activations float16 does not hold; vLLM refuses to run them in it.
IN_BFLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")


def require_plain_activations(activations: str | None, to: str) -> None:
    """Raise `ConfigError` for a checkpoint whose layers round what they read, which no other format says.

    activations: the format of `spec.activations`, None for none; to: the format that is wanted.
    """
    if activations is not None:
        raise ConfigError(
            f"the layers round what they read to {activations}, which {to} cannot say: the model would answer otherwise. "
            "Quantize without --activations for it."
        )


def dtype_for(model_type: str) -> torch.dtype:
    """Return what a model is to be computed in, and its plain tensors stored in. Scales are float16 in every format."""
    return torch.bfloat16 if model_type in IN_BFLOAT16 else torch.float16


def contents_of(checkpoint: Checkpoint, files: ModelFiles, form: Format) -> Contents:
    """Return what a checkpoint holds, if the format holds it too.

    Raises `ConfigError`, before anything is written, for weights with a transform, of another width, and of kinds that the
    format has no place for; it says what to do instead.
    """
    contents = Contents(
        {path: checkpoint.layout(path) for path in checkpoint.stored.linears()},
        checkpoint.config.modules_to_not_convert,
    )
    rotated = sum(layout.rotations > 0 for layout in contents.layouts.values())
    scaled = sum(not _unit(checkpoint, path) for path in contents.layouts)
    if rotated or scaled:
        raise ConfigError(
            f"{counted(max(rotated, scaled), 'layer')} of {len(contents.layouts)} have a transform (rotations or channel "
            f"scales), which {form.name} cannot hold: without it a weight is on no grid. {REMEDY}"
        )
    require_held(contents, form, *sites_of(files))
    return contents


def _unit(checkpoint: Checkpoint, path: str) -> bool:
    """Tell whether the channel scales of a linear are all 1."""
    name = checkpoint.stored.names_of(path)["channel_scales"]
    return bool((checkpoint.stored.load(name) == 1).all())


def require_held(contents: Contents, form: Format, sites: Mapping[str, Site], names: Names) -> None:
    """Raise `ConfigError` for weights that a format does not hold: by their layout, or because they are embeddings or experts."""
    for path in contents.layouts:
        site = sites.get(path)
        embedding = isinstance(site, EmbeddingSite) or path.rpartition(".")[2] == "lm_head"
        if embedding and not form.embeddings:
            raise ConfigError(
                f"{path} is a quantized embedding, which {form.name} does not hold. Quantize without --head-bits and "
                "--embedding-bits, or choose mlx or gguf."
            )
        if isinstance(site, ExpertSite) and (not form.experts or not names.joins(f"{path}.weight")):
            raise ConfigError(
                f"{path} is an expert, which {form.name} does not hold as this model stores it. Choose compressed-tensors, awq "
                "or gptq for a model that stores its experts one by one; others run with pairquant's own format."
            )
    form.require(contents)


def converted_entries(
    checkpoint: Checkpoint, contents: Contents, form: Format, kept_in: torch.dtype
) -> dict[str, Entry]:
    """Return every tensor of the checkpoint as the format stores it, in the order of ours; plain floating ones in `kept_in`."""
    stored, packed = checkpoint.stored, checkpoint.stored.packed_names()

    @lru_cache(maxsize=1)
    def converted(path: str) -> dict[str, Tensor]:
        return form.tensors(checkpoint.packed(path))

    entries: dict[str, Entry] = {}
    for name, field in stored.fields.items():
        path, _, part = name.rpartition(".")
        if path in contents.layouts and part == "qweight":
            for own, its in form.fields(contents.layouts[path]).items():
                entries[f"{path}.{own}"] = Entry(its, lambda path=path, own=own: converted(path)[own])  # type: ignore[misc]
        elif name not in packed or part == "bias":
            dtype = kept_in if field.dtype.is_floating_point and part != "bias" else field.dtype
            entries[name] = Entry(Field(dtype, field.shape), partial(kept, checkpoint, name, dtype))
    return entries


def kept(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    """Return a plain tensor of the checkpoint in this dtype."""
    return cast(name, checkpoint.stored.load(name), dtype)


def cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor of this name in this dtype; raises `CheckpointError` if it holds larger numbers than that."""
    result = value.to(dtype)
    if dtype.is_floating_point and not torch.isfinite(result).all():
        raise CheckpointError(
            f"tensor {name} has values up to {value.abs().max():.3g}, more than {dtype} holds. Export the checkpoint to bf16 or fp32 instead."
        )
    return result
